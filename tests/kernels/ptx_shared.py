"""Shared memory of all blocks, for ptx.py, which tells who read and wrote what and when."""

import numpy as np


class Fault(Exception):
    """The kernel did what no kernel may do."""


class SharedMemory:
    """Bytes of one block after the other, their last readers and writers by words of four bytes.

    Between two barriers lies an epoch, and between two barriers of clusters an era.
    """

    def __init__(self, blocks, threads, size):
        self.size, self.threads, self.epoch, self.era = size, threads, 0, 0
        self.bytes = np.full(blocks * size, 0xFF, np.uint8)
        words = blocks * size // 4
        self.written, self.writer = np.full(words, -1), np.full(words, -1)
        self.last_read, self.reader = np.full(words, -1), np.full((2, words), -1)
        self.copies, self.groups = [], np.zeros(blocks * threads, int)  # on their way; of a thread
        self.written_from_afar, self.read_in = np.full(words, -1), np.full(words, -1)

    def after_barrier(self, of_clusters: bool):
        """Begins an epoch, and an era if the barrier was of clusters."""
        self.epoch += 1
        self.era += of_clusters

    def read(self, places: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """What lies at places [N, bytes], each read by one of the threads [N].

        Raises:
            Fault: for a race, or where nothing was written.
        """
        words, who = _words(places, threads)
        others = self.writer[words] != who
        if ((self.written[words] == self.epoch) & others).any():
            raise Fault("shared memory is read without a barrier after it was written")
        if ((self.written_from_afar[words] == self.era) & others).any():
            raise Fault("shared memory is read without a cluster's barrier after it was written")
        if (self.written[words] < 0).any():
            raise Fault("shared memory is read that was never written")
        before = np.unique(words[self.last_read[words] != self.epoch])
        self.reader[0, before], self.reader[1, before] = 2**62, -1
        self.last_read[words], self.read_in[words] = self.epoch, self.era
        np.minimum.at(self.reader[0], words, who)
        np.maximum.at(self.reader[1], words, who)
        return self.bytes[places]

    def write(self, places: np.ndarray, threads: np.ndarray, values: np.ndarray, far: bool):
        """As read; far is whether other blocks of the cluster may write here.

        Raises:
            Fault: for a race.
        """
        words, who = _words(places, threads)
        if len(np.unique(words)) != words.size:
            raise Fault("two threads write the same shared memory")
        if ((self.written[words] == self.epoch) & (self.writer[words] != who)).any():
            raise Fault("shared memory is written twice without a barrier between")
        others = (self.reader[0, words] != who) | (self.reader[1, words] != who)
        if ((self.last_read[words] == self.epoch) & others).any():
            raise Fault("shared memory is written without a barrier after it was read")
        if far and ((self.read_in[words] == self.era) & others).any():
            raise Fault("shared memory is written without a cluster's barrier after it was read")
        self.written[words], self.writer[words] = self.epoch, who
        if far:
            self.written_from_afar[words] = self.era
        self.bytes[places] = values

    def start_copy(self, places: np.ndarray, threads: np.ndarray, values: np.ndarray):
        """As write, but nothing is there before `wait`."""
        self.write(places, threads, values, far=False)
        self.written[_words(places, threads)[0]] = -1
        self.copies.append((places, threads, values, self.groups[threads]))

    def commit(self, mask: np.ndarray):
        """What threads of the mask started since their last call is a group."""
        self.groups[mask] += 1

    def wait(self, mask: np.ndarray, left: int):
        """Copies of these threads arrive, but for those of their last `left` groups."""
        copies, self.copies = self.copies, []
        for copy in copies:
            threads, groups = copy[1], copy[3]
            there = mask[threads] & (groups < self.groups[threads] - left)
            if there.any():
                self.write(*(z[there] for z in copy[:3]), far=False)
            if not there.all():
                self.copies.append(tuple(z[~there] for z in copy))


def _words(places, threads):
    words = places[:, ::4] // 4
    return words, np.broadcast_to(threads[:, None], words.shape)
