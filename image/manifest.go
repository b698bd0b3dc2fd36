package image

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"

	"github.com/droverproject/drover/block"
)

const manifestVersion = 1

// maxManifest bounds the length of a manifest in bytes: enough for a disk of 16 TiB.
const maxManifest = 2 << 30

// Manifest says what a backup held when it was made, so that it can be verified without what it was made of.
type Manifest struct {
	Version int    `json:"drover-manifest"`
	File    string `json:"file"`             // the backup
	Source  string `json:"source,omitempty"` // what it is a backup of
	Size    int64  `json:"virtual-size"`
	// Base is the backup below, and BaseSum what the whole disk was there: they tell the order of a chain.
	Base     string `json:"base,omitempty"`
	BaseSum  string `json:"base-sum,omitempty"`
	Bitmap   string `json:"bitmap,omitempty"`
	Exported int64  `json:"exported"` // bytes of the disk that the backup is about
	// Sum is the hash of the disk as a whole (see Sum), with all that stands below; LayerSum that of the backup alone (see
	// LayerSum).
	Sum      string `json:"sum"`
	LayerSum string `json:"layer-sum"`
	// Blocks are the SHA-256 of the disk's blocks of 1 MiB; "" is one of zeroes.
	Blocks []string `json:"blocks"`
}

func (m *Manifest) setBlocks(blocks []blockHash) {
	m.Blocks = make([]string, len(blocks))
	zero := zeroBlockHash()
	for i, h := range blocks {
		if h != zero {
			m.Blocks[i] = hex.EncodeToString(h[:])
		}
	}
	m.Sum = sumText(sumOf(m.Size, blocks))
}

// blockHashes decodes the hashes, and makes sure that they are those that Sum speaks of.
func (m *Manifest) blockHashes() ([]blockHash, error) {
	if n := (m.Size + sumBlock - 1) / sumBlock; m.Size < 0 || int64(len(m.Blocks)) != n {
		return nil, fmt.Errorf("the manifest has %d blocks, and a disk of %d bytes has %d", len(m.Blocks), m.Size, n)
	}
	blocks := make([]blockHash, len(m.Blocks))
	for i, text := range m.Blocks {
		if text == "" {
			blocks[i] = zeroBlockHash()
			continue
		}
		if n, err := hex.Decode(blocks[i][:], []byte(text)[:min(len(text), 2*sha256.Size)]); err != nil || n != sha256.Size || len(text) != 2*sha256.Size {
			return nil, fmt.Errorf("block %d of the manifest is not a hash", i)
		}
	}
	if sumText(sumOf(m.Size, blocks)) != m.Sum {
		return nil, fmt.Errorf("the manifest is damaged: its blocks are not those of its sum")
	}
	return blocks, nil
}

// Write writes the manifest as JSON.
func (m *Manifest) Write(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", " ")
	enc.SetEscapeHTML(false)
	return enc.Encode(m)
}

// ReadManifest reads a manifest and makes sure that it is whole.
func ReadManifest(r io.Reader) (*Manifest, error) {
	var m Manifest
	if err := json.NewDecoder(io.LimitReader(r, maxManifest)).Decode(&m); err != nil {
		return nil, fmt.Errorf("reading the manifest: %w", err)
	}
	if m.Version != manifestVersion {
		return nil, fmt.Errorf("reading the manifest: version %d is not known", m.Version)
	}
	if _, err := m.blockHashes(); err != nil {
		return nil, err
	}
	return &m, nil
}

// LayerSum hashes what an image holds itself, opened without what stands below it: which parts those are, and their
// content. It depends on what is allocated, but not on where it lies, nor on whether it is compressed.
func LayerSum(ctx context.Context, dev block.Device) ([]byte, error) {
	h := sha256.New()
	var last span
	put := func() {
		var b [16]byte
		binary.BigEndian.PutUint64(b[:], uint64(last.off))
		binary.BigEndian.PutUint64(b[8:], uint64(last.end-last.off))
		h.Write(b[:])
	}
	if dev.Size() > 0 {
		err := dev.Extents(ctx, 0, dev.Size(), func(e block.Extent) bool {
			switch {
			case !e.Allocated:
			case last.end == e.Off && last.end > last.off:
				last.end = e.End()
			default:
				if last.end > last.off {
					put()
				}
				last = span{e.Off, e.End()}
			}
			return true
		})
		if err != nil {
			return nil, &StatusError{0, err}
		}
	}
	if last.end > last.off {
		put()
	}
	content, err := Sum(ctx, dev, SumOptions{})
	if err != nil {
		return nil, err
	}
	h.Write(content)
	return h.Sum(nil), nil
}

// Mismatch is where a disk is not what its manifest says.
type Mismatch struct {
	What     string // what it is about
	Off, Len int64  // the first part of the disk that differs; Len is 0 if that is not known
}

func (e *Mismatch) Error() string {
	if e.Len == 0 {
		return e.What
	}
	return fmt.Sprintf("%s, first in the %d bytes from offset %d on", e.What, e.Len, e.Off)
}

// VerifyDisk compares a disk with what a manifest says the whole disk was. The error is a *Mismatch if it is another.
func VerifyDisk(ctx context.Context, dev block.Device, m *Manifest, progress Progress) error {
	want, err := m.blockHashes()
	if err != nil {
		return err
	}
	if dev.Size() != m.Size {
		return &Mismatch{What: fmt.Sprintf("the disk has %d bytes, not %d", dev.Size(), m.Size)}
	}
	got, err := blockSums(ctx, dev, progress, nil)
	if err != nil {
		return err
	}
	for i := range want {
		if got[i] != want[i] {
			off := int64(i) * sumBlock
			return &Mismatch{"the disk holds something else", off, min(sumBlock, m.Size-off)}
		}
	}
	return nil
}

// VerifyLayer compares what a backup holds itself, opened without what stands below, with its manifest.
func VerifyLayer(ctx context.Context, dev block.Device, m *Manifest) error {
	sum, err := LayerSum(ctx, dev)
	if err != nil {
		return err
	}
	if sumText(sum) != m.LayerSum {
		return &Mismatch{What: "the backup does not hold what was written to it"}
	}
	return nil
}
