from data.errors import run_main
from data.toy.world import main

run_main(main)
