"""Whole clusters in one process under virtual time; everything left to chance follows from a seed.

    world.py        one story: a cluster is founded, things go wrong under load, all is mended
    node.py         a master's machine: the real replica, proposer and operations on simulated disks
    clients.py      sessions that repeat each operation until they are told what came of it
    faults.py       what goes wrong, and how often
    invariants.py   what must hold after every event, whatever has gone wrong
    clock.py        the event loop with virtual time; processes that can be killed and paused
    net.py          connections in the place of TCP        disk.py, store.py   disks
    mutants.py      faults planted on purpose: is each found?
    core/           the Raft layer alone, without the loop: shorter, and denser in faults

`python -m tests.sim --seed N` replays a story exactly.
"""
