"""Every adapter, for the tests that hold for each."""

from app.adapters._base import Adapter
from app.adapters._examples import ExampleAdapter
from app.adapters.auto_clip import AutoCLIP
from app.adapters.cosine import Cosine
from app.adapters.gda import GDA
from app.adapters.gda_em import GDAEM
from app.adapters.inmap import InMaP
from app.adapters.inmap_zlap import InMaPZLaP
from app.adapters.stat_a import StatA
from app.adapters.tda import TDA
from app.adapters.tfup import TFUP
from app.adapters.tip_adapter import TipAdapter
from app.adapters.trans_clip import TransCLIP
from app.adapters.zlap import ZLaP

EXAMPLE_ADAPTERS: tuple[type[ExampleAdapter], ...] = (
    GDA,
    GDAEM,
    InMaP,
    InMaPZLaP,
    StatA,
    TDA,
    TFUP,
    TipAdapter,
    TransCLIP,
    ZLaP,
)

ADAPTERS: tuple[type[Adapter], ...] = (AutoCLIP, Cosine, *EXAMPLE_ADAPTERS)
