"""Whole clusters in one process under virtual time; everything left to chance follows from a seed.

    world.py        one story: a cluster is founded, things go wrong under load, all is mended
    node.py         a master's machine: the real master (Raft, services, LMDB) or learner
    chunkserver.py  a chunkserver's machine: the real links to the masters over copies.py, its disk
    clients.py      real client sessions; files.py: grants, writes, fsync, commit, reading
    faults.py       what goes wrong, and how often
    stories_raft.py what goes wrong in one order, after one rule of the masters' each
    readers.py      clients that ask certain masters, whoever leads
    invariants.py   what must hold of logs, states and answers after every event
    promises.py     what must hold of acknowledged data
    clock.py        the event loop with virtual time; processes that can be killed and paused
    net.py, tcp.py  connections between replicas, and streams below the real rpc
    disk.py         the disk below the real journal: written, synced, torn, full, failing
    mutants.py      faults planted on purpose (planted.py): is each found?
    core/           the Raft layer alone, without the loop: shorter, and denser in faults

`python -m tests.sim --seed N` replays a story exactly; `--log` prints what its processes log.
"""
