"""Print pip constraints for the oldest versions of the dependencies that setup.cfg allows."""

import configparser
import re

config = configparser.ConfigParser()
config.read("setup.cfg", encoding="utf-8")
for line in config["options"]["install_requires"].splitlines():
    match = re.match(r"([\w-]+)\s*>=\s*([\w.]+)(.*)", line.strip())
    if match:
        print(f"{match[1]}=={match[2]}{match[3]}")
