"""What kernels of two normalised branches, a and b, do to a token.

With n = a / sqrt(mean(a^2) + epsilon) and the cotangent d of n scale_a,

    da = (d scale_a - n mean(d scale_a n)) / sqrt(mean(a^2) + epsilon)
    d scale_a = sum over tokens of d n

and likewise for b.
"""

from jax import lax

from gt_jax.kernels.elementwise.residual_norm_rows import Tokens
from gt_jax.kernels.pallas import rows


class Branches(Tokens):
    """What a row of threads does to a token of both branches. Pairs are of a and of b."""

    def read_each(self, names, token, or_zeros=False):
        """Sections of each of these arrays."""
        read = lambda name: self.read(getattr(self.refs, f"{name}_gmem"), token, or_zeros=or_zeros)
        return tuple(map(read, names))

    def scales(self):
        """Sections of both scales."""
        return [self.parameter(z) for z in (self.refs.scale_a_gmem, self.refs.scale_b_gmem)]

    def inverses(self, branches, epsilon, turn, *more):
        """1 / sqrt(mean of squares + epsilon) of each branch, and the sums of `more`."""
        squares = [sum((z * z for z in x), rows.zeros(self.row)) for x in branches]
        a, b, *more = rows.sums_over_row([*squares, *more], self.row, self.refs.row_sums, turn)
        return *(lax.rsqrt(z * (1 / self.width) + epsilon) for z in (a, b)), *more

    def along_norms(self, cotangents, normed, scales, turn):
        """d n of both branches, and the sums over channels of d scale n."""
        of_scale = [[d * x for d, x in zip(*z)] for z in zip(cotangents, normed)]
        along = [
            sum((d * s for d, s in zip(*z)), rows.zeros(self.row)) for z in zip(of_scale, scales)
        ]
        return of_scale, rows.sums_over_row(along, self.row, self.refs.along, turn)

    def through_norm(self, cotangent, normed, scale, along, inverse):
        """Sections of the gradient of one branch."""
        mean = along * (1 / self.width)
        return ((d * s - x * mean) * inverse for d, s, x in zip(cotangent, scale, normed))
