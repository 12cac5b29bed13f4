/* What JAX's compiler of Pallas kernels asks of the CUDA driver, for a GPU that is not there: its
   compute capability (COMPUTE_CAPABILITY=80 in the environment), and to load what it compiled. */
#include <stdio.h>
#include <stdlib.h>

enum { CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76, MAX_DYNAMIC_SHARED_MEMORY = 8 };

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 12090; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  int capability = atoi(getenv("COMPUTE_CAPABILITY"));
  *value = attribute == CAPABILITY_MAJOR ? capability / 10 :
           attribute == CAPABILITY_MINOR ? capability % 10 : 0;
  return 0;
}
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = (void *)1;
  return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
  if (attribute == MAX_DYNAMIC_SHARED_MEMORY) fprintf(stderr, "%d bytes of shared memory\n", value);
  return 0;
}
int cuGetErrorString(int error, const char **text) { *text = "from a stub"; return 0; }
