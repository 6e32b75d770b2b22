#!/usr/bin/env bash
# Install what the tests need and run them; arguments go to pytest: scripts/test.sh -k golden -x
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

environment dev
cd "$ROOT"
exec "$VENV/bin/python" -m pytest "$@"
