import generate  # noqa: F401  first of all: it sets how CPU threads wait, before torch is loaded
