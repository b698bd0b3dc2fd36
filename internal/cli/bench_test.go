package cli

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"
)

var runTime = regexp.MustCompile(`in \d+\.\d{3} seconds`)

func TestBenchLikeQEMU(t *testing.T) {
	images(t)
	for _, args := range []string{
		"-c 100 base", "-c 100 -f qcow2 base", "-c 100 -w -f qcow2 base", "-c 100 -w -d 4 -s 8k -S 16k -o 1M -f qcow2 base", "-c 100 -f raw raw",
		"-c 100 -w --flush-interval=10 base", "-c 100 --flush-interval=10 base", "-c 100 -w -d 4 --flush-interval=8 -f qcow2 base",
		"-c 100 -w -d 4 --flush-interval=4 --no-drain -f qcow2 base", "-c 100 --no-drain base", "-c 0 base", "-c x base", "-d x base", "-s x base",
		"-S x base", "-o x base", "--pattern=300 base", "--pattern=0x41 -w -c 10 -f qcow2 base", "-q -c 10 base", "-i foo -c 10 base",
		"-i threads -c 10 base", "-t foo base", "-t none -c 10 base", "", "a b", "nosuch", "-c 10 -w raw", "-U -c 10 base", "-U -w -c 10 base",
		"-c 1 -s 16M base", "-o 9M -c 10 base", "--flush-interval=x base", "-c 100 -s 4097 base", "-s 3G -c 1 base", "-f bogus base",
		"--image-opts driver=qcow2,file.filename=base -c 10", "-Z base", "-c 100 -d 1 -s 64k top",
	} {
		args := append([]string{"bench"}, strings.Fields(args)...)
		want := tool(t, "qemu-img", args...)
		want.stderr = strings.ReplaceAll(want.stderr, "qemu-img", "drover")
		got := drover(t, args...)
		for _, o := range []*outcome{&got, &want} {
			o.stdout = runTime.ReplaceAllString(o.stdout, "in time")
		}
		compare(t, args, got, want)
	}
}

// TestBenchWrites: what a benchmark writes lies where it says.
func TestBenchWrites(t *testing.T) {
	images(t)
	mustTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "ours", "2M")
	mustTool(t, "qemu-img", "create", "-q", "-f", "qcow2", "stock", "2M")
	args := []string{"bench", "-w", "-c", "8", "-d", "3", "-s", "64k", "-S", "128k", "-o", "1M", "--pattern=7", "--flush-interval=4", "-f", "qcow2"}
	mustDrover(t, append(args, "ours")...)
	mustTool(t, "qemu-img", append(args, "stock")...)
	mustTool(t, "qemu-img", "compare", "-q", "ours", "stock")
	mustTool(t, "qemu-img", "check", "-q", "ours")
}

func TestBenchForPrograms(t *testing.T) {
	images(t)
	var r benchResult
	if err := json.Unmarshal([]byte(mustDrover(t, "bench", "--output=json", "-c", "50", "base")), &r); err != nil {
		t.Fatal(err)
	}
	if r.Command != "bench" || r.Requests != 50 || r.Seconds <= 0 || r.PerSec <= 0 || r.Depth != 64 || r.Size != 4096 {
		t.Errorf("%+v", r)
	}
}
