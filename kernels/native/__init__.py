"""Products of few bits in C++, for CPUs: built at install where a compiler is there."""
