#!/usr/bin/env bash
exec bash "$(dirname "$0")/../run_1p.sh" eval "$@"
