// Package damage breaks images on purpose, by the format's description and without the engine's codec: the tests of check
// and repair need damage that the code under test did not make.
package damage

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Image is the bytes of an image file.
type Image struct {
	B []byte

	Version      uint32
	ClusterBits  uint
	RefcountBits uint64
	Extended     bool
	DataFile     bool // L2 entries are no references to clusters of the image
}

// Entry flags.
const (
	Copied     uint64 = 1 << 63
	Compressed uint64 = 1 << 62
	offsetMask uint64 = 0x00fffffffffffe00
)

// Parse looks at the header of an image.
func Parse(b []byte) (*Image, error) {
	if len(b) < 104 || string(b[:4]) != "QFI\xfb" {
		return nil, errors.New("not an image")
	}
	x := &Image{B: b, Version: binary.BigEndian.Uint32(b[4:]), ClusterBits: uint(binary.BigEndian.Uint32(b[20:])), RefcountBits: 16}
	if x.Version >= 3 {
		x.RefcountBits = 1 << binary.BigEndian.Uint32(b[96:])
		x.Extended, x.DataFile = b[79]&16 != 0, b[79]&4 != 0
	}
	return x, nil
}

// Cluster returns the length of a cluster.
func (x *Image) Cluster() uint64 { return 1 << x.ClusterBits }

// Word returns the word at a host offset, 0 behind the end of the file.
func (x *Image) Word(off uint64) uint64 {
	if off+8 > uint64(len(x.B)) {
		return 0
	}
	return binary.BigEndian.Uint64(x.B[off:])
}

// Set writes a word, and makes the file longer where needed.
func (x *Image) Set(off, v uint64) {
	for uint64(len(x.B)) < off+8 {
		x.B = append(x.B, 0)
	}
	binary.BigEndian.PutUint64(x.B[off:], v)
}

// Set32 writes a field of the header.
func (x *Image) Set32(off int, v uint32) { binary.BigEndian.PutUint32(x.B[off:], v) }

// Flip flips bits of a word.
func (x *Image) Flip(off, bits uint64) { x.Set(off, x.Word(off)^bits) }

// L1 returns where the entry of the active L1 table for a guest offset is.
func (x *Image) L1(guest uint64) uint64 {
	return x.Word(40) + 8*(guest>>(x.ClusterBits+x.l2Bits()))
}

func (x *Image) l2Bits() uint {
	if x.Extended {
		return x.ClusterBits - 4
	}
	return x.ClusterBits - 3
}

// L2 returns where the L2 entry for a guest offset is, 0 if there is no table.
func (x *Image) L2(guest uint64) uint64 {
	table := x.Word(x.L1(guest)) & offsetMask
	if table == 0 {
		return 0
	}
	size := uint64(8)
	if x.Extended {
		size = 16
	}
	return table + guest>>x.ClusterBits&(1<<x.l2Bits()-1)*size
}

// Data returns where the data of a guest offset is.
func (x *Image) Data(guest uint64) uint64 { return x.Word(x.L2(guest)) & offsetMask }

// RefTable returns where the entry of the refcount table is that leads to the refcount of a host offset.
func (x *Image) RefTable(host uint64) uint64 {
	return x.Word(48) + 8*((host>>x.ClusterBits)/(x.Cluster()*8/x.RefcountBits))
}

// Block returns where the refcount block of a host offset is.
func (x *Image) Block(host uint64) uint64 { return x.Word(x.RefTable(host)) &^ 511 }

// SetRefcount sets the refcount of a host cluster whose refcounts have a block.
func (x *Image) SetRefcount(host, v uint64) {
	i := (host >> x.ClusterBits) % (x.Cluster() * 8 / x.RefcountBits)
	block := x.B[x.Block(host):]
	switch {
	case x.RefcountBits < 8:
		shift := i * x.RefcountBits % 8
		mask := byte(1<<x.RefcountBits-1) << shift
		p := &block[i*x.RefcountBits/8]
		*p = *p&^mask | byte(v)<<shift
	default:
		n := x.RefcountBits / 8
		var b [8]byte
		binary.BigEndian.PutUint64(b[:], v)
		copy(block[i*n:][:n], b[8-n:])
	}
}

// End returns the first cluster behind the end of the file.
func (x *Image) End() uint64 { return (uint64(len(x.B)) + x.Cluster() - 1) &^ (x.Cluster() - 1) }

// Kind is one way to damage an image.
type Kind struct {
	Name string
	Do   func(x *Image)
	// Loses: guest data is gone, or nobody can know which it was.
	Loses bool
	// Stays: no repair leaves the image without errors.
	Stays bool
	// Shares: a cluster has two references then, which a refcount of one bit cannot count.
	Shares bool
	// Maps: the damage is to where a guest cluster lies.
	Maps bool
	// Version3 and Extended: the damage needs such an image.
	Version3, Extended bool
}

// String returns the name.
func (k Kind) String() string { return k.Name }

// Fits reports whether the damage can be done to an image, and be repaired if it ever can.
func (k Kind) Fits(x *Image) bool {
	return (!k.Version3 || x.Version >= 3) && (!k.Extended || x.Extended) && (!k.Shares || x.RefcountBits > 1) &&
		(!x.DataFile || !k.Loses && !k.Maps)
}

// Kinds are damages of an image whose guest clusters 0, 1 and 2 have data and are no snapshot's, whose guest cluster 3
// reads as zeroes and has a host cluster if that can be, and whose first L2 table has room at its end.
func Kinds() []Kind {
	at := func(n uint64) func(*Image) uint64 { return func(x *Image) uint64 { return n * x.Cluster() } }
	g0, g1, g2, g3 := at(0), at(1), at(2), at(3)
	return []Kind{
		{Name: "refcount 0", Do: func(x *Image) { x.SetRefcount(x.Data(g0(x)), 0) }},
		{Name: "all refcounts of data 0", Do: func(x *Image) {
			for _, g := range []func(*Image) uint64{g0, g1, g2} {
				x.SetRefcount(x.Data(g(x)), 0)
			}
		}},
		{Name: "refcount 0 of the header", Do: func(x *Image) { x.SetRefcount(0, 0) }},
		{Name: "refcount 0 of the L1 table", Do: func(x *Image) { x.SetRefcount(x.Word(40), 0) }},
		{Name: "refcount 0 of an L2 table", Do: func(x *Image) { x.SetRefcount(x.L2(0), 0) }},
		{Name: "refcount 0 of the refcount table", Do: func(x *Image) { x.SetRefcount(x.Word(48), 0) }},
		{Name: "refcount 0 of a refcount block", Do: func(x *Image) { x.SetRefcount(x.Block(0), 0) }},
		{Name: "refcount block of zeroes", Do: func(x *Image) { clear(x.B[x.Block(0):][:x.Cluster()]) }},
		{Name: "refcount block of ones", Do: func(x *Image) {
			b := x.B[x.Block(0):][:x.Cluster()]
			for i := range b {
				b[i] = 0xff
			}
		}},
		{Name: "refcount too high", Do: func(x *Image) { x.SetRefcount(x.Data(g1(x)), x.most(3)) }},
		{Name: "refcount of an L2 table too high", Do: func(x *Image) { x.SetRefcount(x.L2(0), x.most(2)) }},
		{Name: "refcount too low for two", Do: func(x *Image) { x.Set(x.L2(g0(x)), x.Word(x.L2(g1(x)))) }, Loses: true, Shares: true},
		{Name: "leak at the end", Do: func(x *Image) {
			x.B = append(x.B, make([]byte, x.End()-uint64(len(x.B))+x.Cluster())...)
			x.SetRefcount(uint64(len(x.B))-1, 1)
		}},
		{Name: "unused end", Do: func(x *Image) { x.B = append(x.B, make([]byte, 5*x.Cluster())...) }},
		{Name: "refcount block lost", Do: func(x *Image) { x.Set(x.RefTable(0), 0) }},
		{Name: "refcount block unaligned", Do: func(x *Image) { x.Flip(x.RefTable(0), 0x100) }},
		{Name: "refcount block with reserved bits", Do: func(x *Image) { x.Flip(x.RefTable(0), 6) }},
		{Name: "refcount block behind the end", Do: func(x *Image) { x.Set(x.RefTable(0), x.End()+40*x.Cluster()) }},
		{Name: "refcount block is the L1 table", Do: func(x *Image) { x.Set(x.RefTable(0), x.Word(40)) }},
		{Name: "refcount block is data", Maps: true, Do: func(x *Image) { x.Set(x.RefTable(0), x.Data(g0(x))) }},
		{Name: "refcount block is the header", Do: func(x *Image) { x.Set(x.RefTable(0), 0x200) }},
		{Name: "refcount table of noise", Do: func(x *Image) {
			for i := range uint64(8) {
				x.Set(x.Word(48)+8*i, (i+3)*0x9e3779b97f4a7c15)
			}
		}},
		{Name: "refcount table behind the end", Do: func(x *Image) { x.Set(48, x.End()+3*x.Cluster()) }},
		{Name: "refcount table is the header", Do: func(x *Image) { x.Set(48, 0) }},
		{Name: "no refcount table", Do: func(x *Image) { x.Set32(56, 0) }},
		{Name: "L1 entry without COPIED", Do: func(x *Image) { x.Flip(x.L1(0), Copied) }},
		{Name: "L1 entry with reserved bits", Do: func(x *Image) { x.Flip(x.L1(0), 1<<57|1) }},
		{Name: "L1 entry unaligned", Do: func(x *Image) {
			if x.Cluster() > 512 { // otherwise no bit of the offset is wrong
				x.Flip(x.L1(0), 0x200)
			}
		}},
		{Name: "L1 entry lost", Do: func(x *Image) { x.Set(x.L1(0), 0) }, Loses: true},
		{Name: "L1 entry of nothing but COPIED", Do: func(x *Image) { x.Set(x.L1(0), Copied) }, Loses: true},
		{Name: "L1 entry behind the end", Do: func(x *Image) { x.Set(x.L1(0), Copied|1<<50) }, Loses: true, Stays: true},
		{Name: "L2 entry without COPIED", Do: func(x *Image) { x.Flip(x.L2(g1(x)), Copied) }},
		{Name: "L2 entry with reserved bits", Do: func(x *Image) { x.Flip(x.L2(g1(x)), 1<<60|4) }},
		{Name: "L2 entry unaligned", Maps: true, Do: func(x *Image) {
			if x.Cluster() > 512 {
				x.Flip(x.L2(g1(x)), 0x200)
			}
		}},
		{Name: "preallocated zero cluster unaligned", Maps: true, Version3: true, Do: func(x *Image) {
			if x.Cluster() > 512 && x.Data(g3(x)) != 0 {
				x.Flip(x.L2(g3(x)), 0x200)
			}
		}},
		{Name: "L2 entry lost", Do: func(x *Image) {
			x.Set(x.L2(g1(x)), 0)
			if x.Extended {
				x.Set(x.L2(g1(x))+8, 0)
			}
		}, Loses: true},
		{Name: "L2 entry behind the end", Do: func(x *Image) { x.Set(x.L2(g1(x)), Copied|1<<50) }, Loses: true, Stays: true},
		{Name: "L2 entry is the L2 table", Do: func(x *Image) { x.Set(x.L2(g1(x)), x.Word(x.L1(0))) }, Loses: true, Shares: true},
		{Name: "L2 entry is a refcount block", Do: func(x *Image) { x.Set(x.L2(g1(x)), Copied|x.Block(0)) }, Loses: true, Shares: true},
		{Name: "L2 entry is the L1 table", Do: func(x *Image) { x.Set(x.L2(g1(x)), Copied|x.Word(40)) }, Loses: true, Shares: true},
		{Name: "data and zeroes in one subcluster", Extended: true, Do: func(x *Image) { x.Flip(x.L2(g1(x))+8, 1<<32) }},
		{Name: "dirty", Version3: true, Do: func(x *Image) { x.Flip(72, 1) }},
		{Name: "corrupt", Version3: true, Do: func(x *Image) { x.Flip(72, 2) }},
		{Name: "dirty and no refcounts", Version3: true, Do: func(x *Image) {
			x.Flip(72, 1)
			clear(x.B[x.Block(0):][:x.Cluster()])
		}},
		{Name: "corrupt, a leak and a lost block", Maps: true, Version3: true, Do: func(x *Image) {
			x.Flip(72, 2)
			x.SetRefcount(x.Data(g2(x)), x.most(2))
			x.Flip(x.L2(g0(x)), Copied)
			x.Set(x.RefTable(0), 0)
		}},
	}
}

// most returns n, or the largest refcount.
func (x *Image) most(n uint64) uint64 {
	if x.RefcountBits < 8 {
		n = min(n, 1<<x.RefcountBits-1)
	}
	return n
}

// Apply damages a copy of an image.
func (k Kind) Apply(b []byte) ([]byte, error) {
	x, err := Parse(append([]byte(nil), b...))
	if err != nil {
		return nil, fmt.Errorf("damaging an image: %w", err)
	}
	k.Do(x)
	return x.B, nil
}
