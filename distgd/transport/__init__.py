"""Messages between processes, and the memory that processes of one machine share.

    endpoint    one process's place: who is reached how, and who is let in
    node        a connection within a machine: sockets carry headers, arrays lie in shared segments
    tcp         a connection between machines, and where the system has no such sockets
    channel     what both of them do
    proof       how two ends of a connection prove that they know the run's secret
    segments    shared memory: allocated whole, nameless, gone with the last process that has it
    inmemory    the twin on one thread

An endpoint sends to incarnations and receives from them. What a message means is no business of this room, and how
its arrays travel is none of the actors'. Messages between two processes arrive in order and at most once; what was
under way to a process that died is lost.

Shards and the driver listen, everybody dials, and an answer goes back over the connection that the asker made, so
workers are dialed by nobody but workers of the same machine.
"""

from distgd.transport.endpoint import Endpoint, Place
from distgd.transport.inmemory import Envelope, InMemoryEndpoint, InMemoryNetwork

__all__ = ["Endpoint", "Envelope", "InMemoryEndpoint", "InMemoryNetwork", "Place"]
