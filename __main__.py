"""``python -m subquad`` is the ``subquad`` command."""

from subquad.cli import main

if __name__ == "__main__":
    main()
