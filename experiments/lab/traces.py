"""What devices did, from a profiler trace: events by device, and their share in collectives."""

import collections
import glob
import re
import tempfile

import jax

# Names of kernels that exchange data: NCCL's, and those of XLA's that replace them for small sizes.
COLLECTIVE = re.compile(
    r"nccl|all.?gather|reduce.?scatter|all.?reduce|collective.?permute|all.?to.?all|send_?recv",
    re.IGNORECASE,
)
COPY = re.compile(r"mem(cpy|set)", re.IGNORECASE)
# Names of operations that take as long as those in them, on a CPU.
HOLDS_OTHERS = re.compile(r"(while|conditional|call)(\.\d+)?$")


def planes(run):
    """Planes of a trace of run(): of each device, or of the host where devices have none."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        found = list(jax.profiler.ProfileData.from_file(path).planes)
    return [plane for plane in found if plane.name.startswith("/device:")] or found


def operations(run):
    """Events of what devices did in run().

    Without devices, of the operations of compiled programs: the trace of a host also holds its
    Python, threads that wait, and loops beside what is in them.
    """
    found = []
    for plane in planes(run):
        events = (event for line in plane.lines for event in line.events)
        if not plane.name.startswith("/device:"):
            events = (event for event in events if _is_operation(event))
        found += events
    return found


def _is_operation(event):
    return "hlo_op" in dict(event.stats) and not HOLDS_OTHERS.match(event.name)


def kernels(run):
    """[(name, begin, end)] in ns of the kernels of run(), for each GPU that ran any; [] on CPUs."""
    devices = []
    for plane in planes(run):
        if not plane.name.startswith("/device:GPU"):
            continue
        events = [
            (event.name, event.start_ns, event.start_ns + event.duration_ns)
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
            if not COPY.match(event.name)
        ]
        if events:
            devices.append(events)
    return devices


def collective_shares(devices):
    """Collectives beside computation, the mean over devices of `kernels`; {} without any device.

    Returns:
        "collective" and "exposed": share of the time from the first kernel's begin to the last
        one's end in which a collective runs, and in which nothing else does; a collective that
        waits for another device counts as running. "ms": of each kind of collective, in all.
    """
    if not devices:
        return {}
    collective = exposed = 0.0
    each = collections.Counter()
    for events in devices:
        begin, end = min(e[1] for e in events), max(e[2] for e in events)
        exchanging = _union([e[1:] for e in events if COLLECTIVE.search(e[0])])
        computing = _union([e[1:] for e in events if not COLLECTIVE.search(e[0])])
        both = _union(exchanging + computing)
        collective += _length(exchanging) / (end - begin) / len(devices)
        exposed += (_length(both) - _length(computing)) / (end - begin) / len(devices)
        for name, first, last in events:
            if COLLECTIVE.search(name):
                each[name.split("(")[0]] += (last - first) / 1e6 / len(devices)
    return {"collective": collective, "exposed": exposed, "ms": dict(each.most_common())}


def _union(intervals):
    """Disjoint intervals that cover the same points, in order."""
    joined = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _length(intervals):
    return sum(end - begin for begin, end in intervals)
