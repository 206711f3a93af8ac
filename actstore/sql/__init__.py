"""One query: a locked session, parameters, a process that can be killed, and vectors in SQL."""
