package qcow2

import (
	"context"
	"errors"
	"fmt"

	"github.com/droverproject/drover/qcow2/internal/format"
	"github.com/droverproject/drover/qcow2/internal/meta"
	"github.com/droverproject/drover/storage"
)

// mapAll gives every guest cluster a host cluster: of zeroes, or, where there is a backing file, one that waits for data
// while the backing file shows through. Only subclusters can say that.
func (im *Image) mapAll(ctx context.Context, mode Preallocation) error {
	end := im.cluster(roundUp(im.Size(), im.lay.ClusterSize()))
	p := preallocation{im: im, mode: mode, relieve: func() error { return im.meta.Pressure(ctx) }, through: im.hdr.BackingFile != ""}
	return p.mapRange(ctx, 0, end)
}

// preallocation maps guest clusters that nothing is mapped for.
type preallocation struct {
	im   *Image
	mode Preallocation
	// relieve makes room in the metadata cache.
	relieve func() error
	through bool // what lies below stays visible
	// progress, if not nil, is told how many bytes of the range are done.
	progress func(done, total int64)
}

func (p preallocation) mapRange(ctx context.Context, first, end meta.GuestCluster) error {
	for c := first; c < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := p.relieve(); err != nil {
			return err
		}
		n, err := p.mapRun(c, int64(end-c))
		if err != nil {
			return err
		}
		c += meta.GuestCluster(n)
		if p.progress != nil {
			p.progress(int64(c-first)<<p.im.lay.ClusterBits, int64(end-first)<<p.im.lay.ClusterBits)
		}
	}
	return nil
}

// mapRun maps up to n clusters from c on, and returns how many.
func (p preallocation) mapRun(c meta.GuestCluster, n int64) (int64, error) {
	im := p.im
	edit, err := im.meta.Map.Prepare(c)
	if err != nil {
		return 0, err
	}
	defer edit.Done()
	if im.lay.DataFile && im.crypt != nil {
		return 0, fmt.Errorf("preallocation of an encrypted image: %w", ErrDataFile)
	}
	host, n := format.HostOff(c)<<im.lay.ClusterBits, min(n, edit.N) // where it lies in an external data file
	if !im.lay.DataFile {
		run, virgin, err := im.meta.Refs.Alloc(n)
		if err != nil {
			return 0, err
		}
		host, n = im.lay.Offset(run.First), run.N
		if err := p.reserve(int64(host), n<<im.lay.ClusterBits, virgin); err != nil {
			return 0, errors.Join(err, im.meta.Refs.Release(run))
		}
		if err := p.encryptZeroes(c, int64(host), n); err != nil {
			return 0, errors.Join(err, im.meta.Refs.Release(run))
		}
	}
	edit.Put(0, n, func(k int64, _ meta.Entry) meta.Entry {
		return p.entry(host + format.HostOff(k<<im.lay.ClusterBits))
	})
	return n, nil
}

// entry returns the entry of a preallocated cluster. In an encrypted image it says that the cluster is zeroes, for what lies
// on the host is not.
func (p preallocation) entry(host format.HostOff) meta.Entry {
	e := p.im.dataEntry(host)
	switch {
	case p.through:
		e.Bitmap = 0
	case p.im.crypt == nil || p.im.lay.Version < format.Version3:
	case p.im.lay.ExtendedL2:
		e.Bitmap = format.BitmapAllZero
	default:
		e.Word = format.MakeL2ZeroAlloc(host, true)
	}
	return e
}

// encryptZeroes writes zeroes as the guest is to read them where no entry can stand for them: to version 2 images.
func (p preallocation) encryptZeroes(c meta.GuestCluster, host, n int64) error {
	im := p.im
	if im.crypt == nil || im.lay.Version >= format.Version3 {
		return nil
	}
	off := int64(c) << im.lay.ClusterBits
	for end := off + n<<im.lay.ClusterBits; off < end; {
		part := min(end-off, int64(len(zeroChunk)))
		if err := im.writeHost(zeroChunk[:part], off, host); err != nil {
			return err
		}
		off, host = off+part, host+part
	}
	return nil
}

// reserve makes length bytes at host ready: they read as zeroes, and the file reaches to their end. virgin says that they
// read as zeroes already.
func (p preallocation) reserve(host, length int64, virgin bool) error {
	file := p.im.file
	if p.mode == PreallocFull || !virgin {
		p.im.meta.Wrote(host, length)
		if err := zeroDevice(file, host, length); err != nil {
			return fmt.Errorf("writing zeroes at host offset %#x: %w", host, err)
		}
		return nil
	}
	if p.mode == PreallocFalloc {
		if err := file.Preallocate(host, length); err != nil {
			return fmt.Errorf("reserving %d bytes at host offset %#x: %w", length, host, err)
		}
	}
	// No entry points behind the end of the file. Its length is made by writing, not set: somebody may be writing behind.
	at := host + length - storage.SectorSize
	p.im.meta.Wrote(at, storage.SectorSize)
	if err := storage.WriteFull(file, zeroChunk[:storage.SectorSize], at); err != nil {
		return fmt.Errorf("extending the file to %d bytes: %w", host+length, err)
	}
	return nil
}
