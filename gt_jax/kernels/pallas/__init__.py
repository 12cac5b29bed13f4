"""What the Pallas kernels share.

devices.py says where they run and loads no Pallas itself; launch.py starts them, early.py lets them
compile before the program around them is lowered, splits.py cuts long sequences of few heads,
tiles.py handles matrices on chip, terms.py writes float32 numbers as sums of bfloat16 ones, and
products.py multiplies on the tensor cores.
"""
