package vm

import _ "embed"

// BenchScript is the job of test/vm/bench.
//
//go:embed jobs/bench.sh
var BenchScript []byte
