"""The native tier: one small C library, compiled on first use, called through ctypes; absent without harm."""
