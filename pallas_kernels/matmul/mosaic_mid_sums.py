"""Sums of a tile in `mosaic_mid`: of a block's teams, then of the blocks that share the tile.

A thread has 4 sums of each 8 columns. Of each stripe of columns every team keeps 8. Of a tile that
several blocks share, each of a cluster keeps some stripes; without clusters, all but one leave
their sums in device memory, and the block with the start adds them, in order.
"""

from pallas_kernels import mosaic as mg
from pallas_kernels import mosaic_memory as mem
from pallas_kernels.matmul.mid_layout import SUMS, THREADS, WARPS, Layout


class Sums:
    """One thread's view of them. `share` is the block's; `warp` is uniform."""

    def __init__(self, layout: Layout, sums, scratch, share: mg.Int, warp: mg.Int):
        self.layout, self.share, self.warp = layout, share, warp
        self.thread = mg.thread_index()
        self.lane, self.team = self.thread & (mg.WARP - 1), warp // layout.team_warps
        self.rank = mg.Int(0)  # in the cluster
        if layout.cluster > 1:
            self.rank = mg.cluster_rank()
            self.received = mem.shared_address(scratch["x"])
            self.all_received = mem.Barriers(scratch["received"], 1)
        self.staging = mem.shared_address(scratch[layout.staged])
        if sums:
            self.left, self.marks = (mem.global_address(ref) for ref in sums)
            self.tag = mem.grid_tag()

    def initialize(self) -> None:
        """By one thread, before any other of its block or cluster goes on."""
        if self.layout.cluster > 1:
            self.all_received.initialize(1)
            others, stripes = self.layout.cluster - 1, self.layout.stripes
            own = (mg.Int(stripes + others) - self.rank) // (others + 1)
            self.all_received.expect(mg.Int(0), own * (others * SUMS))

    # Sums of the teams

    def exchange(self, acc: list) -> list[list]:
        """Sum what the teams have; each keeps 8 columns of a stripe."""
        layout, groups = self.layout, by_fours(acc)
        teams = layout.teams
        if teams == 1:
            return groups
        groups += [[mg.zero()] * 4] * (layout.stripes * teams - len(groups))
        at_once = layout.staging // ((teams - 1) * SUMS)
        kept = []
        for first in range(0, layout.stripes, at_once):
            stripes = range(first, min(first + at_once, layout.stripes))
            mg.sync_block()  # what was there before is read
            own = []
            for i, stripe in enumerate(stripes):
                mine, *others = self._rotate(groups[teams * stripe :][:teams])
                own.append(mine)
                for distance, four in enumerate(others, 1):
                    mem.store_floats(self._place(i, self.team + distance, distance), four)
            mg.sync_block()
            for distance in range(1, teams):
                places = [self._place(i, self.team, distance) for i in range(len(stripes))]
                own = _add(own, [mem.load_floats(place, 4) for place in places])
            kept += own
        return kept

    def _rotate(self, groups: list[list]) -> list[list]:
        """The groups of a stripe, from the team's own on."""
        step = 1
        while step < len(groups):
            moves = (self.team & step).equals(step)
            moved = groups[step:] + groups[:step]
            groups = [_select(moves, a, b) for a, b in zip(moved, groups, strict=True)]
            step *= 2
        return groups

    def _place(self, stripe: int, team: mg.Int, distance: int) -> mg.Int:
        """Where a team gets sums of a stripe from the team that is so far before it."""
        teams, threads = self.layout.teams, THREADS // self.layout.teams
        number = (team & (teams - 1)) + (stripe * (teams - 1) + distance - 1) * teams
        return self.staging + (number * threads + (self.thread & (threads - 1)) << 4)

    # Sums of the blocks of a cluster

    def exchange_blocks(self, acc: list) -> list[list]:
        """Sum what the teams of a cluster's blocks have; each block keeps some stripes."""
        count, stripes = self.layout.cluster, self.layout.own_stripes
        all_received = self.all_received.address(mg.Int(0))
        mg.arrive_at_cluster()
        kept = self.exchange(acc)
        mg.await_cluster()  # all have read their x
        for i, four in enumerate(kept):
            owner = i % count
            with mg.when(mg.Int(0) < (self.rank ^ owner)):
                distance = mg.select(self.rank < owner, self.rank + count, self.rank) - owner
                place, barrier = (
                    mem.remote_address(address, mg.Int(owner))
                    for address in (self._received(i // count, distance), all_received)
                )
                mem.send(place, four, barrier)
        kept += kept[:1] * (stripes * count - len(kept))  # past the end nothing is stored
        own = kept[0::count]
        for owner in range(1, count):
            own = [
                _select(self.rank.equals(owner), a, b)
                for a, b in zip(kept[owner::count], own, strict=True)
            ]
        self.all_received.wait(mg.Int(0), mg.Int(0))
        for distance in range(1, count):
            places = [self._received(i, mg.Int(distance)) for i in range(stripes)]
            own = _add(own, [mem.load_floats(place, 4) for place in places])
        return own

    def _received(self, stripe: int, distance: mg.Int) -> mg.Int:
        """Where a block gets sums of one of its stripes from the block that is so far after it."""
        number = (distance - 1) * self.layout.own_stripes + stripe
        return self.received + (number * SUMS + (self.thread << 4))

    # Sums of other blocks, through device memory

    def leave(self, acc: list) -> None:
        """Leave the sums of a tile's later part to the block that has its start."""
        for i, four in enumerate(self.exchange(acc)):
            mem.store_floats(self._sum_place(self.share, i), four)
        mg.sync_warp()
        with mg.when(self.lane.equals(0)):
            mem.signal(self._mark_place(self.share), self.tag)

    def gather(self, acc: list, others: mg.Int) -> list[list]:
        """Sum what the teams have, and what the next `others` shares left."""
        kept = self.exchange(acc)

        def take(i: mg.Int, _: list) -> list:
            index = self.lane + i * mg.WARP
            with mg.when(index < others):
                mem.await_signal(self._mark_place(self.share + 1 + index), self.tag)
            return []

        mg.loop((others + (mg.WARP - 1)) // mg.WARP, [], take)
        mg.sync_warp()
        return self._add_left(kept, others)

    def _add_left(self, kept: list[list], others: mg.Int) -> list[list]:
        """Add what those shares left."""
        together = self.layout.together

        def load(index: mg.Int) -> list[list]:
            exists, share = index < others, (self.share + 1 + index).at_most(self.layout.blocks - 1)
            sums = [mem.load_floats(self._sum_place(share, i), 4) for i in range(len(kept))]
            return [_select(exists, four, [mg.zero()] * 4) for four in sums]

        def body(i: mg.Int, carry: list) -> list:
            total = by_fours(carry)
            for sums in [load(i * together + j) for j in range(together)]:
                total = _add(total, sums)
            return flat(total)

        return by_fours(mg.loop((others + (together - 1)) // together, flat(kept), body))

    def _mark_place(self, share: mg.Int) -> mg.Int:
        """Where this warp of a share marks that its sums are there: a warp needs no other's."""
        return self.marks + (share * WARPS + self.warp << 3).wide()

    def _sum_place(self, share: mg.Int, stripe: int) -> mg.Int:
        """Where a share's sums of a stripe are, this thread's."""
        number = share * self.layout.stripes + stripe
        return self.left + (number * SUMS + (self.thread << 4)).wide()


def _add(a: list[list], b: list[list]) -> list[list]:
    return [[mg.add(u, v) for u, v in zip(p, q)] for p, q in zip(a, b, strict=True)]


def _select(condition: mg.Value, yes: list, no: list) -> list:
    return [mg.select_float(condition, y, n) for y, n in zip(yes, no, strict=True)]


def flat(fours: list[list]) -> list:
    """The sums of all groups, in one list."""
    return [value for four in fours for value in four]


def by_fours(sums: list) -> list[list]:
    """The opposite of `flat`."""
    return [sums[i : i + 4] for i in range(0, len(sums), 4)]
