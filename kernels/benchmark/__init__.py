"""The kernels side by side with their peers, in one run: `python -m kernels.benchmark`.

case.py          which shapes: the grid, and how tokens spread over experts
cost.py          what an operation must move and compute at least, and what the device can do
peer.py          what a peer is: a forward and a backward, and what of its result is compared
rows.py          dispatch and combine        routing.py       the router
feed_forward.py  the experts                 losses.py        masked words and pixels
measure.py       equality first, then rounds that alternate between the peers
report.py        table, JSON, plot
"""
