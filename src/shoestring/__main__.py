"""`python -m shoestring` is the command `shoestring`."""

from .cli.main import entry

if __name__ == "__main__":
    entry()
