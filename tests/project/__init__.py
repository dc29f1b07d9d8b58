"""The house itself: pages, imports, the packed library, the flags of the tests."""
