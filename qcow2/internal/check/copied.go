package check

import (
	"bytes"
	"fmt"

	"github.com/droverproject/drover/qcow2/internal/format"
)

// mendCopied makes the COPIED flags of the active tables agree with what the refcounts are going to be. Flags are cleared
// durably before any is set.
func (r *repairer) mendCopied() error {
	if !r.mayMendCopied() {
		return nil
	}
	own := r.owner()
	for _, set := range []bool{false, true} {
		pass := copiedPass{repairer: r, own: own, set: set}
		if err := pass.run(); err != nil {
			return err
		}
		if !set && pass.changes > 0 {
			if err := r.sync(); err != nil {
				return err
			}
		}
		if pass.later == 0 {
			break
		}
	}
	return nil
}

// mayMendCopied reports whether the refcounts will be right, so that the flags can follow them.
func (r *repairer) mayMendCopied() bool {
	rep := r.c.rep
	if r.o.Mode == RepairAll {
		return rep.Corruptions+rep.Leaks > 0
	}
	return rep.Corruptions == r.c.copied && !r.blind // never after a rebuild: only All does that
}

// copiedPass clears or sets COPIED flags.
type copiedPass struct {
	*repairer
	own     *tableOwner
	set     bool
	changes int64
	later   int64 // flags that the other pass has to set
}

func (p *copiedPass) run() error {
	if err := p.l1(); err != nil {
		return fmt.Errorf("mending the active L1 table: %w", err)
	}
	var active []tableRef
	for _, ref := range p.c.tables.list {
		if ref.active > 0 && p.own.ownsL2(&ref) {
			active = append(active, ref)
		}
	}
	return p.editL2(active, p.table)
}

// flag returns the word as it should be for a cluster.
func (p *copiedPass) flag(word uint64, want bool) uint64 {
	copied := uint64(format.MakeL1(0, true))
	switch has := word&copied != 0; {
	case has == want:
	case p.set && want:
		return word | copied
	case want:
		p.later++
	case !p.set:
		return word &^ copied
	}
	return word
}

func (p *copiedPass) l1() error {
	if !p.own.ownsL1() {
		return nil
	}
	return p.editL1(p.c.h.L1Offset, p.c.h.L1Size, func(words []uint64, first int64) {
		for i, w := range words {
			e := format.L1Entry(w)
			if e.Offset() == 0 {
				continue
			}
			n := p.target(p.c.l.Cluster(e.Offset()))
			if words[i] = p.flag(w, n == 1); words[i] != w {
				p.changes++
				index := first + int64(i)
				p.repaired(Corruption, place{e.Offset(), p.c.l.GuestOffset(index, 0), true},
					"Repairing OFLAG_COPIED L2 cluster: l1_index=%d l1_entry=%x refcount=%d", index, w, n)
			}
		}
	})
}

func (p *copiedPass) table(words []uint64, ref *tableRef) {
	l := p.c.l
	step := int(l.L2EntrySize() / 8)
	for i := 0; i < len(words); i += step {
		if words[i] == 0 {
			continue
		}
		e := format.L2Entry(words[i])
		if k := l.Type(e); k != format.KindNormal && k != format.KindZeroAlloc {
			continue
		}
		n := uint64(1) // as clusters of an external data file count
		if !l.DataFile {
			n = p.target(l.Cluster(e.HostOffset()))
		}
		if words[i] = p.flag(words[i], n == 1); words[i] != uint64(e) {
			p.changes++
			p.repaired(Corruption, place{e.HostOffset(), l.GuestOffset(ref.index, int64(i/step)), true},
				"Repairing OFLAG_COPIED data cluster: l2_entry=%x refcount=%d", uint64(e), n)
		}
	}
}

// editL2 calls fn for each of the tables, and writes what it changed.
func (r *repairer) editL2(list []tableRef, fn func(words []uint64, ref *tableRef)) error {
	old, now := make([]byte, r.c.l.ClusterSize()), make([]byte, r.c.l.ClusterSize())
	return r.c.eachL2(list, func(words []uint64, ref *tableRef) error {
		format.EncodeTable(old, words)
		fn(words, ref)
		format.EncodeTable(now, words)
		if bytes.Equal(old, now) {
			return nil
		}
		if err := r.writeChanged(ref.off, old, now); err != nil {
			return fmt.Errorf("writing L2 table at host offset %#x: %w", ref.off, err)
		}
		return nil
	})
}

// editL1 calls fn for parts of an L1 table, and writes what it changed.
func (r *repairer) editL1(off format.HostOff, entries uint32, fn func(words []uint64, first int64)) error {
	var old, now []byte
	return r.c.words(off, uint64(entries)*8, func(first int64, words []uint64) error {
		if old == nil {
			old, now = make([]byte, 8*len(words)), make([]byte, 8*len(words))
		}
		old, now := old[:8*len(words)], now[:8*len(words)]
		format.EncodeTable(old, words)
		fn(words, first)
		format.EncodeTable(now, words)
		return r.writeChanged(off+format.HostOff(8*first), old, now)
	})
}
