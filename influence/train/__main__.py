import sys

from influence.train.parent import main

if __name__ == "__main__":
    sys.exit(main())
