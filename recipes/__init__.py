"""What trained the bundled models; not in the wheel. From the root of a checkout:

python -m recipes vtok-tiny-internvl --out DIR
"""
