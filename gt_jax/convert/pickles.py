"""The pickle of a torch.save file, read as a description of tensors. It cannot run anything.

A pickle is a program for a stack machine. The interpreter here knows only the operations that
describe tensors by name. It imports nothing, calls nothing and sets no attribute: values of its own
stand for the objects. Keys are text and tuples nest once, so every operation takes a bounded time;
MOST_STEPS bounds the number of operations.
"""

import io
import pickletools
from collections.abc import Callable, Container
from typing import Any, NamedTuple

MOST_STEPS = 1_000_000  # operations; the largest models take some 50,000
MOST_IN_TUPLE = 64

LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
OTHERS = """
    PROTO FRAME STOP MARK TUPLE EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS BINPUT
    LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID REDUCE BUILD
"""
OPCODES = frozenset([*LITERALS, *CONSTANTS, *TUPLES, *OTHERS.split()])
BY_CODE = {opcode.code: opcode for opcode in pickletools.opcodes}
TENSOR = ("torch._utils", "_rebuild_tensor_v2")
PARAMETER = ("torch._utils", "_rebuild_parameter")
ORDERED_DICT = ("collections", "OrderedDict")


class Storage(NamedTuple):
    """What a pickle says of an array of numbers in a file of its own."""

    kind: str  # such as "FloatStorage"
    key: str  # the file's name
    size: int  # numbers


class _Name(NamedTuple):
    """What a pickle would import; here its name is all there is."""

    module: str
    name: str


def load(program: bytes, kinds: Container[str], make_tensor: Callable) -> Any:
    """What a pickle describes: tensors by name in a dict, if it is one of torch.save's.

    Args:
        program: the pickle.
        kinds: names of storages that are known.
        make_tensor: (Storage, offset, shape, strides) -> what stands for a tensor. It gets what
            the pickle says, in tuples for shape and strides, and checks it.

    Raises:
        ValueError: the pickle is damaged, or holds what tensors by name do not need.
    """
    stack, marks, memo = [], [], {}

    def pop(count):
        """The last `count` values, all from after the last mark."""
        start = len(stack) - count
        if start < (marks[-1] if marks else 0):
            raise ValueError("its pickle is damaged: a value is missing")
        values = stack[start:]
        del stack[start:]
        return values

    def pop_to_mark():
        if not marks:
            raise ValueError("its pickle is damaged: a mark is missing")
        values = pop(len(stack) - marks[-1])
        marks.pop()
        return values

    for name, argument in _operations(program):
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            (value,) = pop(1)
            memo[len(memo) if name == "MEMOIZE" else argument] = value
            stack.append(value)
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in memo:
                raise ValueError("its pickle is damaged: it remembers nothing of that number")
            stack.append(memo[argument])
        elif name == "TUPLE" or name in TUPLES:
            stack.append(_tuple(pop_to_mark() if name == "TUPLE" else pop(TUPLES[name])))
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("SETITEM", "SETITEMS"):
            values = pop_to_mark() if name == "SETITEMS" else pop(2)
            _set_items(_top(pop, stack, dict), values)
        elif name in ("APPEND", "APPENDS"):
            values = pop_to_mark() if name == "APPENDS" else pop(1)
            _top(pop, stack, list).extend(values)
        elif name == "GLOBAL":
            module, attribute = argument.split(" ", 1)
            stack.append(_known(module, attribute, kinds))
        elif name == "STACK_GLOBAL":
            module, attribute = pop(2)
            stack.append(_known(module, attribute, kinds))
        elif name == "BINPERSID":
            (pid,) = pop(1)
            stack.append(_storage(pid))
        elif name == "REDUCE":
            function, arguments = pop(2)
            stack.append(_call(function, arguments, make_tensor))
        elif name == "BUILD":  # the attributes of a state_dict, such as its modules' versions
            pop(1)
            _top(pop, stack, dict)
    if marks or len(stack) != 1:
        raise ValueError("its pickle is damaged: it ends in the middle")
    return stack[0]


def _operations(program: bytes) -> list[tuple[str, Any]]:
    """The pickle's operations, (name, argument) each; ValueError if one is not needed."""
    operations: list[tuple[str, Any]] = []
    file = io.BytesIO(program)
    while not operations or operations[-1][0] != "STOP":
        code = file.read(1).decode("latin-1")
        if code not in BY_CODE:
            raise ValueError("its pickle is damaged: it ends early, or holds what no pickle does")
        argument: Any
        opcode = BY_CODE[code]
        if opcode.name not in OPCODES:
            raise ValueError(f"its pickle holds {opcode.name}, which tensors do not need")
        if opcode.name == "GLOBAL":  # pickletools would resolve escapes in it
            argument = f"{_line(file)} {_line(file)}"
        else:
            argument = None if opcode.arg is None else opcode.arg.reader(file)
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(program):
            raise ValueError("its pickle holds LONG_BINPUT of more than its own length")
        operations.append((opcode.name, argument))
        if len(operations) > MOST_STEPS:
            raise ValueError(f"its pickle takes over {MOST_STEPS:,} steps")
    return operations


def _line(file):
    line = file.readline()
    if not line.endswith(b"\n"):
        raise ValueError("its pickle is damaged: it ends early")
    return line[:-1].decode()


def _top(pop, stack, kind):
    (value,) = pop(1)
    if type(value) is not kind:
        raise ValueError(f"its pickle changes a {type(value).__name__}, not a {kind.__name__}")
    stack.append(value)
    return value


def _tuple(values):
    flat = all(type(v) is not tuple or all(type(w) is not tuple for w in v) for v in values)
    if len(values) > MOST_IN_TUPLE or not flat:
        raise ValueError("its pickle nests tuples, which tensors do not need")
    return tuple(values)


def _set_items(target, values):
    if len(values) % 2:
        raise ValueError("its pickle is damaged: a name has no value")
    for key, value in zip(values[::2], values[1::2]):
        if type(key) is not str:
            raise ValueError(f"it holds a {type(key).__name__} for a name")
        if not key.isprintable():
            raise ValueError(f"it holds the name {key[:80]!r}")
        target[key] = value


def _known(module, name, kinds):
    if type(module) is not str or type(name) is not str:  # Lists that share lists print for ever.
        raise ValueError("its pickle imports something without a name")
    wanted = (module, name)
    if wanted not in (TENSOR, PARAMETER, ORDERED_DICT) and not (
        module == "torch" and name in kinds
    ):
        raise ValueError(f"its pickle asks for {module}.{name}, which tensors do not need")
    return _Name(module, name)


def _storage(pid):
    if type(pid) is not tuple or len(pid) != 5:
        raise ValueError("its pickle refers to something that is no tensor storage")
    what, kind, key, _, size = pid
    if (what, type(kind), type(key), type(size)) != ("storage", _Name, str, int):
        raise ValueError("its pickle refers to something that is no tensor storage")
    if kind.module != "torch":
        raise ValueError("its pickle refers to something that is no tensor storage")
    return Storage(kind.name, key, size)


def _call(function, arguments, make_tensor):
    if type(function) is not _Name or type(arguments) is not tuple:
        raise ValueError("its pickle calls something that tensors do not need")
    if function == ORDERED_DICT and not arguments:
        return {}
    if function == PARAMETER and arguments:
        return arguments[0]
    if function == TENSOR and len(arguments) >= 4:
        storage, offset, shape, strides = arguments[:4]
        if (type(storage), type(shape), type(strides)) == (Storage, tuple, tuple):
            return make_tensor(storage, offset, shape, strides)
    raise ValueError(f"its pickle calls {function.module}.{function.name} with other arguments")
