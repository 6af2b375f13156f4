"""Tests; folders mirror the code, ``helpers`` holds what several test modules use."""
