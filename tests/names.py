"""Moved: python -m tests.test_names."""
from tests.test_names import main

if __name__ == "__main__":
    main()
