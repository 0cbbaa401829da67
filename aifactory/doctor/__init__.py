"""The doctor: what is wrong with this machine, its network, the configuration, the storage, the database and the cluster, and what
to do. Each check is a value; whatever is looked at is handed in, so that each is tried against what it must find.

    check     the value, and the report
    machine   Python, CPUs, memory, shared memory, files, GPU
    network   ports that are open, and to whom
    factory   configuration, storage, database, what the configuration needs
    cluster   Ray: authentication, nodes, their clocks, room
    arguments, command   `aifactory doctor`
"""
