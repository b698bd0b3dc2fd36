package kill

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

// The child is this test's own binary. It uses an image with a journal until it is killed. What it sent and what was
// acknowledged it notes in memory that outlives it.
const (
	childEnv    = "DROVER_KILL_CHILD" // the folder of image and books
	childSeed   = "DROVER_KILL_SEED"
	journalSize = 8 << 20 // of the disk
	bookSectors = journalSize / storage.SectorSize
	ackEvery    = 16 // acknowledgements that the child tells with one byte
)

// book says of each sector which version was sent last and which acknowledged last. Version v of a sector is zeroes if v is a
// multiple of 4.
type book struct{ sent, acked [bookSectors]atomic.Uint32 }

func openBook(dir string) (*book, storage.SharedMemory, error) {
	var b *book
	mem, err := storage.OpenShared(filepath.Join(dir, "book"), int64(unsafe.Sizeof(*b)), true)
	if err != nil {
		return nil, nil, err
	}
	return (*book)(unsafe.Pointer(&mem.Bytes()[0])), mem, nil
}

// fillVersion makes a sector look as it does at a version.
func fillVersion(p []byte, sector int, v uint32) {
	clear(p)
	if v%4 == 0 {
		return
	}
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], uint64(sector)<<32|uint64(v))
	}
}

func openKept(dir string, tell func(block.JournalReport)) (block.Device, error) {
	o := block.OpenOptions{Format: "qcow2", Policy: block.AllowAll(), Keep: &block.Keep{Dir: filepath.Join(dir, "journal"),
		OnJournal: func(_ string, r block.JournalReport) { tell(r) }}}
	return block.Open(context.Background(), filepath.Join(dir, "image.qcow2"), o)
}

// child runs until it is killed. What goes wrong it says on standard output, where its parent looks for it.
func child(dir string) error {
	seed, err := strconv.ParseUint(os.Getenv(childSeed), 10, 64)
	if err != nil {
		return err
	}
	b, _, err := openBook(dir)
	if err != nil {
		return err
	}
	dev, err := openKept(dir, func(block.JournalReport) {})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	var acks atomic.Int64
	failed := make(chan error, workers)
	for w := range workers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(w)))
			for {
				if err := b.request(dev, rng, w); err != nil {
					failed <- err
					return
				}
				if acks.Add(1)%ackEvery == 0 {
					if _, err := os.Stdout.Write([]byte{'.'}); err != nil {
						failed <- err
						return
					}
				}
			}
		})
	}
	return <-failed
}

// request changes sectors that are this worker's: every other piece of the disk, so that all workers share clusters.
func (b *book) request(dev block.Device, rng *rand.Rand, w int) error {
	const piece = 12
	first := (rng.IntN(bookSectors/piece/workers)*workers + w) * piece
	skip := rng.IntN(piece)
	first, n := first+skip, 1+rng.IntN(piece-skip)
	ctx := context.Background()
	if rng.IntN(200) == 0 {
		return dev.Flush(ctx)
	}
	v := uint32(0)
	for s := first; s < first+n; s++ {
		v = max(v, b.sent[s].Load())
	}
	zero := rng.IntN(4) == 0
	for v++; (v%4 == 0) != zero; v++ {
	}
	p := make([]byte, n*storage.SectorSize)
	for i := range n {
		b.sent[first+i].Store(v)
		fillVersion(p[i*storage.SectorSize:][:storage.SectorSize], first+i, v)
	}
	off, length := int64(first)*storage.SectorSize, int64(len(p))
	var err error
	switch {
	case zero:
		err = dev.WriteZeroes(ctx, off, length, block.ZeroUnmap*block.ZeroFlags(rng.IntN(2)))
	case rng.IntN(2) == 0 && dev.(block.TryDevice).TryWriteAt(p, off) == nil:
	case rng.IntN(2) == 0:
		err = block.WriteV(ctx, dev, [][]byte{p[:storage.SectorSize], p[storage.SectorSize:]}, off, 0)
	default:
		err = dev.WriteAt(ctx, p, off, 0)
	}
	if err != nil {
		return err
	}
	for i := range n {
		b.acked[first+i].Store(v)
	}
	return nil
}

// verify compares what is there with the books, and enters what it finds.
func (b *book) verify(dev block.Device) error {
	got, want := make([]byte, journalSize), make([]byte, storage.SectorSize)
	if err := dev.ReadAt(context.Background(), got, 0); err != nil {
		return err
	}
	for s := range bookSectors {
		sector, sent, acked := got[s*storage.SectorSize:][:storage.SectorSize], b.sent[s].Load(), b.acked[s].Load()
		found := false
		for _, v := range []uint32{acked, sent} {
			if fillVersion(want, s, v); bytes.Equal(sector, want) {
				found = true
				// Both count as sent: versions only grow.
				b.acked[s].Store(v)
				break
			}
		}
		if !found {
			return fmt.Errorf("sector %d holds %x..., not version %d, which was acknowledged, nor %d, which was sent", s, sector[:16], acked, sent)
		}
		if b.acked[s].Load() != sent {
			next := sent + 4 - (sent-b.acked[s].Load())%4 // the same kind of content under a number of its own
			fillVersion(want, s, next)
			if err := dev.WriteAt(context.Background(), want, int64(s)*storage.SectorSize, 0); err != nil {
				return err
			}
			b.sent[s].Store(next)
			b.acked[s].Store(next)
		}
	}
	return nil
}

// TestSIGKILLLosesNothingAcknowledged: with a journal, nothing that was acknowledged is lost with the process, flushed or not.
func TestSIGKILLLosesNothingAcknowledged(t *testing.T) {
	peer.Need(t, "qemu-img")
	for name, o := range map[string]qcow2.CreateOptions{
		"64K clusters":      {},
		"4K clusters":       {ClusterSize: 4096},
		"512 byte clusters": {ClusterSize: 512, RefcountBits: 64},
		"subclusters":       {ExtendedL2: true},
		"version 2":         {ClusterSize: 4096, Version: 2},
		"lazy refcounts":    {ClusterSize: 4096, LazyRefcounts: true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "image.qcow2")
			f, err := storage.CreateFile(path, storage.OpenOptions{})
			harness.OK(t, err)
			o.Size = journalSize
			harness.OK(t, qcow2.Create(context.Background(), f, o))
			harness.OK(t, f.Close())
			brought := int64(0)
			for n := range rounds(t) {
				if n == (rounds(t)+1)/2 && o.Version != 2 { // from then on there is no journal
					harness.Must(t, "qemu-img", "snapshot", "-c", "kept", path)
				}
				live(t, dir, uint64(n))
				harness.MustBeSound(t, path, false)
				brought += judgeBooks(t, dir)
				harness.MustBeSound(t, path, false)
			}
			if brought == 0 && o.Version != 2 {
				t.Error("no journal ever held anything: the test shows nothing")
			}
		})
	}
}

// live has a child use the image, and kills it.
func live(t *testing.T, dir string, seed uint64) {
	t.Helper()
	exe, err := os.Executable()
	harness.OK(t, err)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childEnv+"="+dir, childSeed+"="+strconv.FormatUint(seed, 10))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	harness.OK(t, err)
	harness.OK(t, cmd.Start())
	// The kill comes when so many changes have been acknowledged, with others in flight.
	life := 10 + rand.New(rand.NewPCG(seed, 5)).IntN(150)
	_, readErr := io.ReadFull(bufio.NewReaderSize(out, 16), make([]byte, life))
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if readErr != nil {
		t.Fatalf("the child ended by itself: %v\n%s", readErr, stderr.String())
	}
}

// judgeBooks opens the image again, and returns how many clusters the journal brought back.
func judgeBooks(t *testing.T, dir string) (brought int64) {
	t.Helper()
	b, mem, err := openBook(dir)
	harness.OK(t, err)
	defer mem.Close(false)
	dev, err := openKept(dir, func(r block.JournalReport) {
		if r.Lost != nil {
			t.Errorf("lost: %v", r.Lost)
		}
		brought += r.Clusters
	})
	harness.OK(t, err)
	if err := b.verify(dev); err != nil {
		t.Error(err)
	}
	harness.OK(t, dev.Close())
	return brought
}
