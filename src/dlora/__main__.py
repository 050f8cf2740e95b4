"""`python -m dlora`, which launchers such as torchrun start."""

from dlora.cli import main

if __name__ == "__main__":
    main()
