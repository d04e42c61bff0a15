"""``python -m wsi_mmm`` is ``wsi-mmm``."""

from wsi_mmm.cli.main import main

if __name__ == "__main__":
    main()
