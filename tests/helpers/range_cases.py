"""Values at the ends of a hyper-parameter's range, written as an interval by hand."""

import math


def ends_of(interval):
    """Return (what must be refused, what must be taken) of ``"(low, high]"``."""
    low, high = map(float, interval[1:-1].split(","))
    refused = [math.nextafter(low, -math.inf), math.nextafter(high, math.inf), math.nan]
    # beyond an infinite end there is nothing
    refused = [value for value in refused if value not in (low, high)]
    taken = []
    (taken if interval[0] == "[" else refused).append(low)
    (taken if interval[-1] == "]" else refused).append(high)
    return refused, taken
