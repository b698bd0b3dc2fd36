package interop

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// TestSpoiltImages changes bytes where they hurt most, in the header and in the metadata, and demands that every command
// ends in good order: with an exit status that it is documented to have, and never by a crash. What check makes of such
// an image is what QEMU makes of it.
func TestSpoiltImages(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	image := filepath.Join(dir, "image.qcow2")
	harness.Must(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", image, "8M")
	harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 100k", "-c", "write -q -z 200k 64k", image)
	harness.Must(t, "qemu-img", "snapshot", "-c", "one", image)
	harness.Must(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 2 50k 100k", "-c", "write -q -c -P 3 1M 4k", image)
	good, err := os.ReadFile(image)
	harness.OK(t, err)

	count := 150
	if testing.Short() {
		count = 30
	}
	spoilt := filepath.Join(dir, "spoilt.qcow2")
	for i := range count {
		data, what := spoil(good, uint64(i))
		harness.OK(t, os.WriteFile(spoilt, data, 0o644))
		for _, args := range [][]string{
			{"info", "-f", "qcow2", "--output=json", spoilt},
			{"check", "-f", "qcow2", "--output=json", spoilt},
			{"map", "-f", "qcow2", "--output=json", spoilt},
		} {
			r := harness.Drover(t, args...)
			if args[0] == "check" {
				if q := harness.Run(t, "qemu-img", args...); q.Code != r.Code {
					t.Errorf("image %d, %s: QEMU judges otherwise:\n%s\n%s", i, what, r, q)
				}
			}
			highest := 1
			if args[0] == "check" {
				highest = 3
			}
			if r.Code < 0 || r.Code > highest || bytes.Contains(r.Stderr, []byte("goroutine ")) {
				t.Errorf("image %d, %s:\n%s", i, what, r)
			}
			if r.Code == 1 && len(r.Stderr) == 0 {
				t.Errorf("image %d, %s: %s failed without a word", i, what, args[0])
			}
		}
	}
}

// interesting are values that bounds checks are most often wrong about.
var interesting = []byte{0x00, 0x01, 0x7f, 0x80, 0xff}

// spoil returns a copy of an image with a few bytes changed, or its tail cut off, and says which.
func spoil(good []byte, seed uint64) (data []byte, what string) {
	rng := rand.New(rand.NewPCG(seed, 3))
	data = bytes.Clone(good)
	const header, cluster = 112, 4096
	if rng.IntN(10) == 0 {
		n := rng.IntN(len(data))
		return data[:n], fmt.Sprintf("cut to %d bytes", n)
	}
	for range 1 + rng.IntN(3) {
		at := rng.IntN(header)
		if rng.IntN(2) == 0 {
			// The first words of a cluster: where its tables have their entries.
			at = rng.IntN(len(data)/cluster)*cluster + rng.IntN(256)
		}
		data[at] = interesting[rng.IntN(len(interesting))]
		what += fmt.Sprintf("byte %#x is %#x; ", at, data[at])
	}
	return data, what
}
