#!/usr/bin/env bash
# Run a command beside a throwaway PostgreSQL: .ci/services.sh COMMAND...
# The server listens on a socket in a temporary folder alone, runs as another user than root, and is gone at the end.
# Tests find it by TEST_POSTGRES_URL. Without a server the command runs all the same, and those tests say so.
# The command's output stays last, and its exit status is this script's.
set -uo pipefail

binaries() {  # the newest installed PostgreSQL's folder of programs
  local found
  found=$(ls /usr/lib/postgresql/*/bin/initdb 2>/dev/null | sort -V | tail -1)
  [ -n "$found" ] || found=$(readlink -f "$(command -v initdb)" 2>/dev/null)
  [ -x "$found" ] && dirname "$found"
}

install() {  # Debian's package, without a cluster of its own
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
  export DEBIAN_FRONTEND=noninteractive
  if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
    mkdir -p /etc/postgresql-common && echo "create_main_cluster = false" > /etc/postgresql-common/createcluster.conf
  fi
  local quiet=(-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Dpkg::Options::=--force-confold)
  timeout 120 apt-get "${quiet[@]}" update && timeout 240 apt-get "${quiet[@]}" install -y --no-install-recommends postgresql
}

start() {
  local bin user as=()
  bin=$(binaries) && [ -n "$bin" ] || return 1
  command -v setpriv >/dev/null || return 1
  folder=$(mktemp -d /tmp/phoenix-pg.XXXXXX) || return 1
  user=$(id -un)
  if [ "$(id -u)" = 0 ]; then
    user=$(id -un postgres 2>/dev/null || echo nobody)
    chown "$user" "$folder"
    as=(--reuid "$user" --regid "$(id -g "$user")" --clear-groups)
  fi
  (cd "$folder" && setpriv "${as[@]}" "$bin/initdb" -D "$folder/data" -U phoenix -A trust -E UTF8 --locale=C -N) \
    >"$folder.log" 2>&1 || return 1
  # QUIT lets the server stop at once; the system sends it too when this script is killed
  (cd "$folder" && exec setpriv "${as[@]}" --pdeathsig QUIT "$bin/postgres" -D "$folder/data" -k "$folder" \
    -c listen_addresses= -c fsync=off -c shared_buffers=32MB -c max_connections=60) >>"$folder.log" 2>&1 &
  server=$!
  local i
  for i in $(seq 100); do
    "$bin/pg_isready" -q -h "$folder" -U phoenix -d postgres && break
    kill -0 "$server" 2>/dev/null || return 1
    sleep .2
  done
  export TEST_POSTGRES_URL="postgresql+psycopg://phoenix@/postgres?host=$folder"
}

stop() {  # silent: what the command printed stays last
  [ -n "$server" ] && kill -QUIT "$server" 2>/dev/null && wait "$server" 2>/dev/null
  [ -n "$folder" ] && rm -rf "$folder" "$folder.log"
  return 0
}

server= folder=
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if [ -z "${TEST_POSTGRES_URL:-}" ]; then
  if [ -z "$(binaries)" ]; then install >/dev/null 2>&1 || true; fi
  if start; then echo "services: PostgreSQL answers in $folder"
  else echo "services: no PostgreSQL could be started, the tests marked postgres will say so"; unset TEST_POSTGRES_URL; fi
fi
"$@"
