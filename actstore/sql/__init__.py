"""One query: a locked session, its parameters, a process that can be killed, and vectors in SQL."""
