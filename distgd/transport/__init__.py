"""Messages between processes, and the memory that processes of one machine share.

    endpoint    one process's place: who is reached how, and who is let in
    node        a connection within a machine: sockets carry headers, arrays lie in shared segments
    tcp         a connection between machines, and where the system has no such sockets
    channel     what both of them do
    proof       how two ends of a connection prove that they know the run's secret
    segments    shared memory: allocated whole, nameless, gone with the last process that has it
    session     what two processes have sent each other, whatever becomes of connections
    inmemory    the twin on one thread; lossy, where it loses and doubles messages
    unreliable  such a way between one process and its endpoint, where a plan of faults asks for it

An endpoint sends to incarnations and receives from them. What a message means is no business of this room, and how
its arrays travel is none of the actors'. Messages between two living processes arrive in order and once; what was
under way to a process that died is lost.

Shards and the driver listen, everybody dials, and an answer goes back over the connection that the asker made, so
workers are dialed by nobody but workers of the same machine.
"""

from distgd.transport.endpoint import Endpoint, Place
from distgd.transport.inmemory import Envelope, InMemoryEndpoint, InMemoryNetwork
from distgd.transport.lossy import Loss, LossyNetwork
from distgd.transport.unreliable import Door, Unreliable

__all__ = [
    "Door",
    "Endpoint",
    "Envelope",
    "InMemoryEndpoint",
    "InMemoryNetwork",
    "Loss",
    "LossyNetwork",
    "Place",
    "Unreliable",
]
