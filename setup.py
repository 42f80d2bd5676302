from setuptools import setup

# A release is a tag such as v0.1.0. An sdist has its version in PKG-INFO, an archive made by git in .git_archival.txt;
# a copy without any of them gets the fallback.
setup(use_scm_version={"fallback_version": "0.1.0.dev0"})
