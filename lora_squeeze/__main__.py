"""`python -m lora_squeeze` is `lora-squeeze`."""

from lora_squeeze.cli import main

if __name__ == "__main__":
    main(prog_name="lora-squeeze")
