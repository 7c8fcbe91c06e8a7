"""Continue text with a model. Installed, it is natten-layers-generate; the code is in natten_layers_cli."""

import sys

from natten_layers_cli.launch import generate

if __name__ == "__main__":
    sys.exit(generate())
