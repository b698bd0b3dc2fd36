package harness

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
)

const sector = 512

// Kind is what an Op does.
type Kind int

// The kinds of operation on a disk.
const (
	Write Kind = iota
	WriteFUA
	Zero
	ZeroNoHole
	Trim
	Flush
	ReadBack
)

func (k Kind) String() string {
	return [...]string{"write", "write-fua", "zero", "zero-no-hole", "trim", "flush", "read"}[k]
}

// Op is one operation on a disk. Its content, where it has one, follows from Seed.
type Op struct {
	Kind Kind
	Off  int64
	Len  int
	Seed uint64
}

func (o Op) String() string { return fmt.Sprintf("%v [%d, +%d)", o.Kind, o.Off, o.Len) }

// Shape is what Ops draws from.
type Shape struct {
	Size    int64 // of the disk
	Cluster int   // the lengths and offsets that matter lie around its multiples
	MaxLen  int   // of one operation
	Sectors bool  // whole sectors only
}

// Ops returns n operations that depend on nothing but the seed and the shape. Offsets and lengths are of every kind that
// an image format treats apart: whole clusters, parts of one, several with ragged ends, single odd bytes.
func Ops(seed uint64, n int, s Shape) []Op {
	rng := rand.New(rand.NewPCG(seed, 0x6472_6f76_6572))
	ops := make([]Op, 0, n)
	for range n {
		ops = append(ops, randomOp(rng, s))
	}
	return ops
}

func randomOp(rng *rand.Rand, s Shape) Op {
	op := Op{Seed: rng.Uint64()}
	switch p := rng.IntN(100); {
	case p < 50:
		op.Kind = Write
	case p < 55:
		op.Kind = WriteFUA
	case p < 70:
		op.Kind = Zero
	case p < 75:
		op.Kind = ZeroNoHole
	case p < 85:
		op.Kind = Trim
	case p < 95:
		op.Kind = ReadBack
	default:
		op.Kind = Flush
		return op
	}
	op.Off, op.Len = randomRange(rng, s)
	return op
}

func randomRange(rng *rand.Rand, s Shape) (off int64, n int) {
	cluster := int64(s.Cluster)
	switch rng.IntN(6) {
	case 0: // a few odd bytes
		off, n = rng.Int64N(s.Size), 1+rng.IntN(40)
	case 1: // inside about one cluster
		off, n = rng.Int64N(s.Size), 1+rng.IntN(s.Cluster)
	case 2: // whole clusters
		off, n = rng.Int64N(s.Size)/cluster*cluster, s.Cluster*(1+rng.IntN(4))
	case 3: // several clusters, ragged
		off, n = rng.Int64N(s.Size), 1+rng.IntN(4*s.Cluster)
	case 4: // around a cluster's border
		off, n = rng.Int64N(s.Size)/cluster*cluster-int64(rng.IntN(64)), 1+rng.IntN(128)
	default: // the usual 4 KiB
		off, n = rng.Int64N(s.Size)/4096*4096, 4096
	}
	off = max(off, 0)
	n = min(n, s.MaxLen)
	if s.Sectors {
		off, n = off/sector*sector, (n+sector-1)/sector*sector
	}
	n = int(min(int64(n), s.Size-off))
	return off, n
}

// Content returns the bytes that an operation writes.
func (o Op) Content() []byte {
	p := make([]byte, o.Len)
	Fill(p, o.Seed)
	return p
}

// Fill fills p with bytes that depend on nothing but the seed.
func Fill(p []byte, seed uint64) {
	var key [32]byte
	for i := range key {
		key[i] = byte(seed >> (8 * (i % 8)))
	}
	_, _ = rand.NewChaCha8(key).Read(p) // never fails, as documented
}

// Model is what a disk must hold.
type Model []byte

// NewModel returns a model of a disk that begins with the bytes of base (its backing file, cut or followed by zeroes).
func NewModel(size int64, base []byte) Model {
	m := make(Model, size)
	copy(m, base)
	return m
}

// Apply does an operation to the disk behind the client and to the model, and compares what it can see.
func (m Model) Apply(t testing.TB, c *Client, op Op) {
	t.Helper()
	if err := m.apply(c, op); err != nil {
		t.Fatalf("%v: %v", op, err)
	}
}

func (m Model) apply(c *Client, op Op) error {
	span := m[op.Off : op.Off+int64(op.Len)]
	switch op.Kind {
	case Write, WriteFUA:
		p := op.Content()
		send := c.Write
		if op.Kind == WriteFUA {
			send = c.WriteFUA
		}
		if err := send(p, op.Off); err != nil {
			return err
		}
		copy(span, p)
	case Zero, ZeroNoHole:
		if err := c.Zero(op.Off, op.Len, op.Kind == ZeroNoHole); err != nil {
			return err
		}
		clear(span)
	case Trim:
		if err := c.Trim(op.Off, op.Len); err != nil {
			return err
		}
		return m.adoptTrim(c, op)
	case Flush:
		return c.Flush()
	case ReadBack:
		got := make([]byte, op.Len)
		if err := c.Read(got, op.Off); err != nil {
			return err
		}
		return Same(got, span, op.Off)
	}
	return nil
}

// adoptTrim looks at what a trim left and takes it over: each sector of the range reads as before or as zeroes.
func (m Model) adoptTrim(c *Client, op Op) error {
	got := make([]byte, op.Len)
	if err := c.Read(got, op.Off); err != nil {
		return err
	}
	for i := 0; i < op.Len; {
		pos := op.Off + int64(i)
		n := min(int(sector-pos%sector), op.Len-i)
		now, old := got[i:i+n], m[pos:pos+int64(n)]
		if !bytes.Equal(now, old) && !allZero(now) {
			return fmt.Errorf("after the trim, the sector at %d is neither what it was nor zeroes", pos)
		}
		copy(old, now)
		i += n
	}
	return nil
}

// Save writes the model to a raw file.
func (m Model) Save(t testing.TB, path string) {
	t.Helper()
	OK(t, os.WriteFile(path, m, 0o644))
}

// MustEqualFile compares a raw file with the model, byte by byte.
func (m Model) MustEqualFile(t testing.TB, path, what string) {
	t.Helper()
	got, err := os.ReadFile(path)
	OK(t, err)
	if err := Same(got, m, 0); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// Same compares what was read with what must be there; off is where both begin on the disk.
func Same(got, want []byte, off int64) error {
	if len(got) != len(want) {
		return fmt.Errorf("%d bytes, want %d", len(got), len(want))
	}
	if bytes.Equal(got, want) {
		return nil
	}
	first, wrong := -1, 0
	for i := range got {
		if got[i] != want[i] {
			wrong++
			if first < 0 {
				first = i
			}
		}
	}
	end := min(first+16, len(got))
	return fmt.Errorf("%d wrong bytes, the first at %d (%#x): % x, want % x",
		wrong, off+int64(first), off+int64(first), got[first:end], want[first:end])
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}
