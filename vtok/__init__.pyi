# Written by tests/test_types.py.
from vtok import rl as rl
from vtok.compressor import Compressor as Compressor
from vtok.compressors.aim import AIM as AIM
from vtok.compressors.aim import AIMMerge as AIMMerge
from vtok.compressors.aim import AIMPrune as AIMPrune
from vtok.compressors.corematching import CoreMatching as CoreMatching
from vtok.compressors.corematching import CoreNeurons as CoreNeurons
from vtok.compressors.corematching import CoreTokens as CoreTokens
from vtok.compressors.dart import DART as DART
from vtok.compressors.divprune import DivPrune as DivPrune
from vtok.compressors.downsample import Downsample as Downsample
from vtok.compressors.fastv import FastV as FastV
from vtok.compressors.globalcom2 import GlobalCom2 as GlobalCom2
from vtok.compressors.pool import Pool as Pool
from vtok.compressors.pyramiddrop import PyramidDrop as PyramidDrop
from vtok.compressors.quecc import QueCC as QueCC
from vtok.compressors.random import Random as Random
from vtok.compressors.schedule import Schedule as Schedule
from vtok.compressors.tcc import TCC as TCC
from vtok.compressors.tokenflex import TokenFLEX as TokenFLEX
from vtok.compressors.tome import ToMe as ToMe
from vtok.compressors.uniform import Uniform as Uniform
from vtok.compressors.visionzip import VisionZip as VisionZip
from vtok.config import load as load
from vtok.engine.trace import Trace as Trace
from vtok.errors import VtokError as VtokError
from vtok.patching import Patch as Patch
from vtok.patching import available as available
from vtok.patching import patch as patch
from vtok.patching import unpatch as unpatch
from vtok.text.decoding.token_recycling import TokenRecycling as TokenRecycling
from vtok.types import Selection as Selection
from vtok.types import VisualTokens as VisualTokens

__version__: str
