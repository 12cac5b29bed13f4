"""Runs a kernel's PTX on the CPU: all threads of all blocks at once, a register an array.

It executes what row kernels compile to: warp shuffles, shared memory and barriers, 32-bit floats.
Threads that branch apart run the earlier code first, and so meet again. Faults that a GPU would
keep to itself are errors here: races in shared memory, addresses outside the arrays, barriers that
some threads of a block do not reach, shuffles that some threads of a warp do not, outputs written
twice or never, and what is read before it was written (it is NaN). Rounding of approximate
functions is not a GPU's, and fused products are rounded twice.
"""

import operator
import re

import numpy as np

from tests.kernels import ptx_arithmetic as arithmetic
from tests.kernels.ptx_shared import Fault, SharedMemory

WARP = 32
_GUARD = 256  # bytes between arrays, which nobody may touch
_BLOCK = 24  # bits of an address in a cluster below the block's number plus 1


def execute(
    text: str, arrays: list, outputs: list, blocks: int, threads: int, shared: int, order: list
) -> list:
    """The outputs of a kernel.

    Args:
        text: PTX of a module with one kernel, whose parameters are the addresses of arrays.
        arrays: NumPy arrays of the first parameters; numbers of two bytes may be of any type.
        outputs: (shape, dtype) of those behind.
        blocks, threads: of the grid and of a block.
        shared: bytes of shared memory of a block.
        order: of the parameters, numbers of arrays and then of outputs.

    Raises:
        Fault: see above.
    """
    return _Machine(text, arrays, outputs, blocks, threads, shared, order).run()


class _Machine:
    def __init__(self, text, arrays, outputs, blocks, threads, shared, order):
        self.threads, self.blocks = threads, blocks
        self.thread = np.arange(blocks * threads)
        self.everybody = np.ones(len(self.thread), bool)
        self.outputs, sizes = outputs, [np.asarray(z).nbytes for z in arrays]
        sizes += [int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in outputs]
        self.firsts, end = [], _GUARD
        for size in sizes:
            self.firsts.append(end)
            end += -(-size // _GUARD) * _GUARD + _GUARD
        self.memory = np.full(end, 0xFF, np.uint8)
        self.readable, self.writes = np.zeros(end, bool), np.full(end, -1, np.int8)
        for n, (first, size) in enumerate(zip(self.firsts, sizes)):
            place = slice(first, first + size)
            if n < len(arrays):
                self.memory[place] = np.ascontiguousarray(arrays[n]).reshape(-1).view(np.uint8)
                self.readable[place] = True
            else:
                self.writes[place] = 0
        self.sizes, self.shared = sizes, SharedMemory(blocks, threads, shared)
        cluster = re.search(r"\.reqnctapercluster (\d+)", text)
        self.cluster = int(cluster[1]) if cluster else 1
        self.registers = {
            "%tid.x": (self.thread % threads).astype(np.uint32),
            "%ctaid.x": (self.thread // threads).astype(np.uint32),
            "%cluster_ctaid.x": (self.thread // threads % self.cluster).astype(np.uint32),
        }
        self._parse(text, order)

    def _parse(self, text, order):
        header, body = text.split("\n{\n", 1)
        names = re.findall(r"\.param \.u64 [^,\n]*?(\w+_param_\d+)", header)
        given = [self.firsts[n] for n in order]
        self.parameters = dict(zip(names, given, strict=True))
        body = re.sub(r"//[^\n]*", "", body.split("\n}\n", 1)[0])
        self.code, self.labels = [], {}
        for line in body.split("\n"):
            line = line.strip()
            label = re.match(r"(\$\w+):$", line)
            if label:
                self.labels[label[1]] = len(self.code)
            elif line.endswith(";") and not line.startswith("."):
                guard, name, rest = re.match(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*);$", line).groups()
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
                self.code.append((guard, name, operands))

    def run(self):
        """Runs all groups of threads that are at the same place, the earliest first."""
        groups, waiting, shuffling = {0: self.everybody}, {}, {}
        while groups or waiting or shuffling:
            if not groups and shuffling:
                raise Fault("a shuffle without some threads of a warp")
            if not groups:
                groups, waiting = self._released(waiting)
            at = min(groups)
            mask = groups.pop(at)
            guard, name, operands = self.code[at]
            if name.startswith("shfl"):  # waits for all threads of the warp
                mask = mask | shuffling.pop(at, False)
                whole = np.repeat(mask.reshape(-1, WARP).all(1), WARP)
                if (mask & ~whole).any():
                    shuffling[at], mask = mask & ~whole, mask & whole
            active = mask
            if guard:
                kept = self.value(guard.lstrip("!"), bool)
                active = mask & (~kept if guard[0] == "!" else kept)
            kind, *options = name.split(".")
            following = [(at + 1, mask)]
            if kind == "bra":
                following = [(self.labels[operands[0]], active), (at + 1, mask & ~active)]
            elif kind == "ret":
                following = [(at + 1, mask & ~active)]
            elif kind == "bar" or name.startswith("barrier.cluster.wait"):
                if guard:
                    raise Fault("a barrier for some threads")
                waiting[at], following = mask | waiting.get(at, False), []
            elif active.any():
                try:
                    self._execute(kind, options, operands, active)
                except Fault as fault:
                    raise Fault(f"{fault}: {name} {', '.join(operands)}") from None
            for place, threads in following:
                if threads.any():
                    groups[place] = groups[place] | threads if place in groups else threads
        return self._results()

    def _released(self, waiting):
        """The threads that go on behind barriers, and those that still wait."""
        released, rest = {}, {}
        for at, mask in waiting.items():
            name = self.code[at][1]
            together = self.threads * (1 if name.startswith("bar.") else self.cluster)
            there = mask.reshape(-1, self.threads)
            if (there.any(1) != there.all(1)).any():
                raise Fault("threads of a block wait at different barriers")
            whole = np.repeat(mask.reshape(-1, together).all(1), together)
            if whole.any():
                released[at + 1] = whole
            if (mask & ~whole).any():
                rest[at] = mask & ~whole
        if not released:
            raise Fault("blocks of a cluster wait at different barriers")
        self.shared.after_barrier(any(self.code[at - 1][1] != "bar.sync" for at in released))
        return released, rest

    def _results(self):
        results = []
        for n in range(len(self.firsts) - len(self.outputs), len(self.firsts)):
            place = slice(self.firsts[n], self.firsts[n] + self.sizes[n])
            if (self.writes[place] != 1).any():
                raise Fault(f"a part of output {n} was never written")
            shape, dtype = self.outputs[n - len(self.firsts)]
            results.append(self.memory[place].view(dtype).reshape(shape))
        return results

    def value(self, operand, dtype):
        """An operand as numbers of a type, one a thread."""
        if operand in self.registers:
            found = self.registers[operand]
            return found if found.dtype == dtype else found.view(dtype)
        if operand.startswith("%"):
            raise Fault(f"{operand} is read before it is written")
        if operand.startswith("0f"):
            number = np.uint32(int(operand[2:], 16))
        elif re.match(r"\w*shmem\w*$", operand) and not operand[0].isdigit():
            number = np.uint64(0)
        elif dtype is bool:
            number = np.bool_(int(operand) != 0)
        else:
            size = np.dtype(dtype).itemsize
            number = np.array(int(operand, 0) % 2 ** (8 * size)).astype(f"u{size}")
        return np.full(len(self.thread), number).view(dtype)

    def put(self, name, value, mask):
        """Writes a register of some threads."""
        if value.dtype != bool:
            value = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
        if not mask.all():
            nothing = np.full_like(value, ~value.dtype.type(0))
            value = np.where(mask, value, self.registers.get(name, nothing))
        self.registers[name] = value

    def _execute(self, kind, options, operands, mask):
        method = getattr(self, "_" + kind, None)
        if method:
            method(options, operands, mask)
            return
        target, *given = operands
        dtype = bool if options[-1] == "pred" else arithmetic.dtype_of(options[-1])
        of_kind = arithmetic.OF_FLOATS if options[-1][0] == "f" else arithmetic.OF_INTEGERS
        name = [kind, *(z for z in options[:-1] if z not in ("rn", "approx", "ftz"))]
        function = of_kind[".".join(name)]
        values = [self.value(z, dtype) for z in given]
        if kind in ("shl", "shr"):
            values[1] = self.value(given[1], "u4")
        with np.errstate(all="ignore"):
            self.put(target, function(*values), mask)

    def _fence(self, options, operands, mask):
        pass

    _barrier = _fence  # arriving at a cluster's; all are there when they wait

    def _cp(self, options, operands, mask):
        """Copies to shared memory, which arrive when they are waited for."""
        if options[1] == "commit_group":
            self.shared.commit(mask)
            return
        if options[1] == "wait_group":
            self.shared.wait(mask, int(operands[0]))
            return
        target, source, size = operands
        numbers = ",".join("x" * (int(size) // 4))
        *_, places = self._place(["global", "b32"], numbers, source, mask)
        if not self.readable[places].all():
            raise Fault("a copy from outside the inputs")
        to = self._place(["shared", "b32"], numbers, target, mask)[-1]
        self.shared.start_copy(to, self.thread[mask], self.memory[places])

    def _mapa(self, options, operands, mask):
        size = {"u64": "u8", "u32": "u4"}[options[-1]]  # JAX 0.11, and 0.12
        block = self.value(operands[2], "u4").astype(size) + 1
        self.put(operands[0], self.value(operands[1], size) | block << _BLOCK, mask)

    def _elect(self, options, operands, mask):
        lane, elected = operands[0].split("|")
        first = mask & (self.thread % WARP == 0)
        self.put(lane, np.zeros(len(self.thread), np.uint32), mask)
        self.put(elected, first, mask)

    def _mov(self, options, operands, mask):
        target, source = operands
        pair = lambda z: [y.strip() for y in z.strip("{}").split(",")]
        if target[0] == "{":
            parts = pair(target)
            size = arithmetic.WIDTH[options[0][1:]]
            value = self.value(source, f"u{size}").view(f"u{size // len(parts)}")
            for n, part in enumerate(parts):
                self.put(part, value.reshape(-1, len(parts))[:, n], mask)
        elif source[0] == "{":
            size = arithmetic.WIDTH[options[0][1:]]
            parts = pair(source)
            values = [self.value(z, f"u{size // len(parts)}") for z in parts]
            self.put(target, np.stack(values, 1).reshape(-1).view(f"u{size}"), mask)
        else:
            dtype = bool if options[0] == "pred" else f"u{arithmetic.WIDTH[options[0][1:]]}"
            self.put(target, self.value(source, dtype), mask)

    def _cvta(self, options, operands, mask):
        self._mov(["b64"], operands, mask)

    def _cvt(self, options, operands, mask):
        *_, to, source = options
        with np.errstate(all="ignore"):
            if to == "bf16x2":
                high, low = (arithmetic.to_bfloat16(self.value(z, "f4")) for z in operands[1:])
                found = low.astype("u4") | high.astype("u4") << np.uint32(16)
            elif to == "bf16":
                found = arithmetic.to_bfloat16(self.value(operands[1], "f4"))
            elif source == "bf16":
                found = arithmetic.from_bfloat16(self.value(operands[1], "u2"))
            else:
                found = self.value(operands[1], arithmetic.dtype_of(source)).astype(
                    arithmetic.dtype_of(to)
                )
        self.put(operands[0], found, mask)

    def _setp(self, options, operands, mask):
        compare, *joined, kind = options
        target, *given = operands
        dtype = arithmetic.dtype_of("b16" if kind == "bf16" else kind)
        a, b = (self.value(z, dtype) for z in given[:2])
        if kind == "bf16":
            a, b = arithmetic.from_bfloat16(a), arithmetic.from_bfloat16(b)
        found = getattr(operator, compare)(a, b)
        if joined:
            found = arithmetic.OF_INTEGERS[joined[0]](found, self.value(given[2], bool))
        self.put(target, found, mask)

    def _selp(self, options, operands, mask):
        dtype = f"u{arithmetic.WIDTH[options[0][1:]]}"
        a, b = (self.value(z, dtype) for z in operands[1:3])
        self.put(operands[0], np.where(self.value(operands[3], bool), a, b), mask)

    def _shfl(self, options, operands, mask):
        target, source, by, clamp, members = operands
        if int(members, 0) % 2**32 != 2**32 - 1 or "|" in target:
            raise NotImplementedError("a shuffle of some threads, or one that tells who took part")
        lane = self.thread % WARP
        other = arithmetic.lane_of_shuffle(options[1], lane, int(by, 0) % WARP, int(clamp, 0))
        place = self.thread - lane + other
        self.put(target, self.value(source, "u4")[place], mask)

    def _ld(self, options, operands, mask):
        if options[0].startswith("param"):
            address = self.parameters[operands[1].strip("[]")]
            self.put(operands[0], np.full(len(self.thread), address, np.uint64), mask)
            return
        targets, size, places = self._place(options, operands[0], operands[1], mask)
        if options[0] == "global":
            if not self.readable[places].all():
                raise Fault("a read outside the inputs")
            found = self.memory[places]
        else:
            found = self.shared.read(places, self.thread[mask])
        found = found.reshape(len(places), len(targets), size)
        for n, target in enumerate(targets):
            value = np.full((len(self.thread), size), 0xFF, np.uint8)
            value[mask] = found[:, n]
            self.put(target, value.reshape(-1).view(f"u{size}"), mask)

    def _st(self, options, operands, mask):
        sources, size, places = self._place(options, operands[1], operands[0], mask)
        values = [self.value(z, f"u{size}")[mask].view(np.uint8).reshape(-1, size) for z in sources]
        if options[0] == "global":
            if (self.writes[places] < 0).any():
                raise Fault("a write outside the outputs")
            np.add.at(self.writes, places, 1)
            if (self.writes[places] != 1).any():
                raise Fault("an output is written twice")
            self.memory[places] = np.concatenate(values, 1)
        else:
            values, far = np.concatenate(values, 1), options[0] == "shared::cluster"
            self.shared.write(places, self.thread[mask], values, far)

    def _place(self, options, registers, address, mask):
        """The registers of an access, their size, and the bytes of each thread of the mask."""
        if options[0] not in ("global", "shared", "shared::cluster"):
            raise NotImplementedError(f"memory {options[0]}")
        registers = [z.strip() for z in registers.strip("{}").split(",")]
        size = arithmetic.WIDTH[options[-1].lstrip("bufs")]
        base, offset = re.match(r"\[([%\w]+)(?:\+(-?\d+))?\]$", address).groups()
        kind = f"u{getattr(self.registers.get(base), 'itemsize', 8)}"
        where = self.value(base, kind)[mask].astype(np.int64) + int(offset or 0)
        length = size * len(registers)
        if (where % length).any():
            raise Fault("an address that is not aligned")
        block = self.thread[mask] // self.threads
        if options[0] == "shared::cluster":
            block += (where >> _BLOCK) - 1 - block % self.cluster
            where &= 2**_BLOCK - 1
        limit = len(self.memory) if options[0] == "global" else self.shared.size
        if (where < 0).any() or (where + length > limit).any():
            raise Fault(f"an address outside {options[0]} memory")
        if options[0] != "global":
            where = where + block * self.shared.size
        return registers, size, where[:, None] + np.arange(length)
