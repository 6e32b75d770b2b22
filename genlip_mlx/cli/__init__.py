"""The command line: each module parses one command's words, calls one function, prints what it gives."""
