"""Everything that touches weight files: find, read, name, check, convert, quantize, save, publish.

The one idea: a tensor is known by name, shape and type long before its numbers are read
(`lazy.LazyTensor`), so checks come first, and conversion holds one tensor at a time.
"""
