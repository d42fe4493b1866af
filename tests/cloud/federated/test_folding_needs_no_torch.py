import subprocess
import sys


def test_strategies_rounds_and_averages_are_imported_without_torch() -> None:
    code = (
        "import sys\n"
        "import wearfleet_cloud.federated, wearfleet_cloud.federated.aggregate\n"
        "import wearfleet_cloud.federated.cohort, wearfleet_cloud.federated.round\n"
        "wearfleet_cloud.federated.create_strategy('fedprox', {'mu': 0.1}).info.upload()\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
