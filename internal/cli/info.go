package cli

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow1"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

// maxChain is how many images info lists before it takes the chain for endless.
const maxChain = 200

func (a *app) infoCommand() *cobra.Command {
	var src source
	var output string
	var chain bool
	cmd := &cobra.Command{
		Use:   "info [flags] FILE",
		Short: "Show what an image is",
		Long: `Show what an image is: its format, size, options, snapshots and bitmaps.

info opens nothing but FILE. With --backing-chain it opens the backing files, too,
as far as they are allowed.`,
		Args: oneImage,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			if err := src.set(args[0]); err != nil {
				return err
			}
			list, err := collectInfo(cmd.Context(), &src, chain)
			if err != nil {
				return err
			}
			switch {
			case output == "human":
				a.printInfos(list)
				return nil
			case chain:
				return a.printJSON(list)
			}
			return a.printJSON(list[0])
		},
	}
	src.add(cmd)
	outputFlag(cmd, &output)
	cmd.Flags().BoolVar(&chain, "backing-chain", false, "show the images below as well")
	src.policy.add(cmd.Flags())
	return cmd
}

// imageInfo is the JSON of info, by QEMU's names.
type imageInfo struct {
	VirtualSize  int64           `json:"virtual-size"`
	Filename     string          `json:"filename"`
	Format       string          `json:"format"`
	ActualSize   *int64          `json:"actual-size,omitempty"`
	ClusterSize  int64           `json:"cluster-size,omitempty"`
	Encrypted    bool            `json:"encrypted,omitempty"`
	Backing      string          `json:"backing-filename,omitempty"`
	FullBacking  string          `json:"full-backing-filename,omitempty"`
	BackingFmt   string          `json:"backing-filename-format,omitempty"`
	Snapshots    []jsonSnapshot  `json:"snapshots,omitempty"`
	FormatDetail *formatSpecific `json:"format-specific,omitempty"`
	Dirty        *bool           `json:"dirty-flag,omitempty"`
}

type jsonSnapshot struct {
	ID          string  `json:"id"`
	Name        string  `json:"name"`
	VMStateSize uint64  `json:"vm-state-size"`
	DateSec     int64   `json:"date-sec"`
	DateNsec    int     `json:"date-nsec"`
	VMClockSec  uint64  `json:"vm-clock-sec"`
	VMClockNsec uint64  `json:"vm-clock-nsec"`
	ICount      *uint64 `json:"icount,omitempty"`
}

type formatSpecific struct {
	Type string    `json:"type"`
	Data qcow2Data `json:"data"`
}

// qcow2Data has its fields in the order in which qemu-img lists them.
type qcow2Data struct {
	Compat          string       `json:"compat"`
	CompressionType string       `json:"compression-type"`
	LazyRefcounts   *bool        `json:"lazy-refcounts,omitempty"`
	Bitmaps         []jsonBitmap `json:"bitmaps,omitempty"`
	RefcountBits    int          `json:"refcount-bits"`
	Encrypt         *jsonEncrypt `json:"encrypt,omitempty"`
	DataFile        *string      `json:"data-file,omitempty"`
	DataFileRaw     *bool        `json:"data-file-raw,omitempty"`
	Corrupt         *bool        `json:"corrupt,omitempty"`
	ExtendedL2      *bool        `json:"extended-l2,omitempty"`
}

type jsonBitmap struct {
	Flags       []string `json:"flags"`
	Name        string   `json:"name"`
	Granularity int64    `json:"granularity"`
}

type jsonEncrypt struct {
	IVGenAlg       string     `json:"ivgen-alg,omitempty"`
	IVGenHash      string     `json:"ivgen-hash-alg,omitempty"`
	HashAlg        string     `json:"hash-alg,omitempty"`
	CipherAlg      string     `json:"cipher-alg,omitempty"`
	UUID           string     `json:"uuid,omitempty"`
	Format         string     `json:"format"`
	CipherMode     string     `json:"cipher-mode,omitempty"`
	Slots          []jsonSlot `json:"slots,omitempty"`
	PayloadOffset  *int64     `json:"payload-offset,omitempty"`
	MasterKeyIters *int64     `json:"master-key-iters,omitempty"`
}

type jsonSlot struct {
	Active    bool   `json:"active"`
	Iters     *int64 `json:"iters,omitempty"`
	KeyOffset int64  `json:"key-offset"`
	Stripes   *int64 `json:"stripes,omitempty"`
}

// collectInfo returns what is to be told of the image, and of those below it if chain.
func collectInfo(ctx context.Context, src *source, chain bool) ([]*imageInfo, error) {
	file, format, err := src.openFile()
	if err != nil {
		return nil, err
	}
	path := src.node.LeafPath()
	info, err := readAndClose(ctx, file, path, format)
	if err != nil {
		return nil, err
	}
	node, err := withoutBacking(src, format)
	if err != nil {
		return nil, err
	}
	info.Filename = node.Describe()
	if src.format == block.FormatRaw && (src.node["offset"] != "" || src.node["size"] != "") {
		if info.VirtualSize, err = sizeOf(ctx, src); err != nil {
			return nil, err
		}
	}
	if src.shownFormat != "" {
		info.Format = src.shownFormat
	}
	list := []*imageInfo{info}
	if !chain {
		return list, nil
	}
	var seen []os.FileInfo
	for top := path; info.Backing != ""; {
		if st, err := os.Stat(path); err == nil {
			seen = append(seen, st)
		}
		next, err := openNext(ctx, src, top, path, info, seen)
		if err != nil {
			return nil, err
		}
		info, path = next, next.Filename
		list = append(list, info)
		if len(list) > maxChain {
			return nil, errorf("Could not open '%s': more than %d images stand on one another", top, maxChain)
		}
	}
	return list, nil
}

// withoutBacking is the description of an image without what it says of the images below, which info has no use for.
func withoutBacking(src *source, format string) (block.Options, error) {
	node := maps.Clone(src.node)
	if ref, ok := node["backing"]; ok && (ref == "" || ref == block.Null) {
		if ref == "" {
			src.warn(`Use of "backing": "" is deprecated; use "backing": null instead`)
		}
		delete(node, "backing")
	}
	for _, name := range slices.Sorted(maps.Keys(node)) {
		if name == "backing" || strings.HasPrefix(name, "backing.") {
			return nil, errorf("Could not open '%s': Block format '%s' does not support the option '%s'", src.name, format, name)
		}
	}
	return node, nil
}

// sizeOf opens an image to find out how long its disk is.
func sizeOf(ctx context.Context, src *source) (int64, error) {
	dev, err := block.Open(ctx, src.name, src.openOptions())
	if err != nil {
		return 0, openError(src.name, err)
	}
	return dev.Size(), dev.Close()
}

// openNext reads the image that info, which is the image in the file at image, names as its backing.
func openNext(ctx context.Context, src *source, top, image string, info *imageInfo, seen []os.FileInfo) (*imageInfo, error) {
	file, path, err := block.OpenBackingFile(ctx, top, image, info.Backing, src.openOptions())
	if err != nil {
		var layer *block.OpenError
		if errors.As(err, &layer) {
			err = layer.Err // here the backing file is the image in question
		}
		return nil, openError(info.FullBacking, err)
	}
	if st, err := os.Stat(path); err == nil {
		for _, s := range seen {
			if os.SameFile(s, st) {
				return nil, errors.Join(errorf("Backing file '%s' creates an infinite loop.", path), file.Close())
			}
		}
	}
	format, err := formatOf(file, info.BackingFmt)
	if err != nil {
		return nil, openError(path, errors.Join(err, file.Close()))
	}
	return readAndClose(ctx, file, path, format)
}

func readAndClose(ctx context.Context, file storage.File, path, format string) (*imageInfo, error) {
	info, err := readInfo(ctx, file, path, format)
	if cerr := file.Close(); err == nil && cerr != nil {
		err = cerr
	}
	if err != nil {
		return nil, openError(path, err)
	}
	return info, nil
}

func readInfo(ctx context.Context, file storage.File, path, format string) (*imageInfo, error) {
	info := &imageInfo{Filename: path, Format: format}
	if n := file.Stat().Allocated; n >= 0 {
		info.ActualSize, info.Dirty = &n, new(bool)
	}
	if format == "qcow" {
		return info, fillQCOW1(info, file)
	}
	if format != "qcow2" {
		raw, err := block.NewRaw(keepOpen{file}, block.RawOptions{ReadOnly: true})
		if err != nil {
			return nil, err
		}
		info.VirtualSize = raw.Size()
		return info, nil
	}
	q, err := qcow2.ReadInfo(ctx, file)
	if err != nil {
		return nil, err
	}
	fillQCOW2(info, q)
	return info, nil
}

// keepOpen is a file for a device that will not be closed.
type keepOpen struct{ storage.File }

func (keepOpen) Close() error { return nil }

func fillQCOW1(info *imageInfo, file storage.File) error {
	q, err := qcow1.ReadInfo(file)
	if err != nil {
		return err
	}
	info.VirtualSize, info.ClusterSize, info.Encrypted = q.VirtualSize, q.ClusterSize, q.Encrypted
	info.setBacking(q.BackingFile, "")
	return nil
}

// setBacking notes the backing file that an image names.
func (i *imageInfo) setBacking(name, format string) {
	if name == "" {
		return
	}
	i.Backing, i.BackingFmt, i.FullBacking = name, format, name
	if !hasProtocol(name) {
		i.FullBacking = block.ResolveName(i.Filename, name)
	}
}

func fillQCOW2(info *imageInfo, q *qcow2.Info) {
	info.VirtualSize = q.VirtualSize
	info.ClusterSize = q.ClusterSize
	info.Dirty = &q.Dirty
	info.Encrypted = q.Encryption != nil
	info.setBacking(q.BackingFile, q.BackingFormat)
	for _, s := range q.Snapshots {
		info.Snapshots = append(info.Snapshots, snapshotJSON(s))
	}
	data := qcow2Data{
		Compat: q.Compat, CompressionType: q.CompressionType, RefcountBits: q.RefcountBits,
		Encrypt: encryptJSON(q.Encryption),
	}
	if q.Version >= 3 {
		data.LazyRefcounts, data.Corrupt, data.ExtendedL2 = &q.LazyRefcounts, &q.Corrupt, &q.ExtendedL2
	}
	for _, b := range q.Bitmaps {
		data.Bitmaps = append(data.Bitmaps, bitmapJSON(b))
	}
	if q.HasDataFile {
		data.DataFileRaw = &q.DataFileRaw
		if q.DataFile != "" {
			data.DataFile = &q.DataFile
		}
	}
	info.FormatDetail = &formatSpecific{Type: "qcow2", Data: data}
}

// hasProtocol reports whether a name is shown as it is. "file:" counts, since QEMU does not resolve such names either.
func hasProtocol(name string) bool {
	i := strings.IndexAny(name, ":/")
	return i >= 0 && name[i] == ':'
}

func snapshotJSON(s qcow2.SnapshotInfo) jsonSnapshot {
	j := jsonSnapshot{
		ID: s.ID, Name: s.Name, VMStateSize: s.VMStateSize,
		DateSec: s.Date.Unix(), DateNsec: s.Date.Nanosecond(),
		VMClockSec: s.VMClockNsec / 1e9, VMClockNsec: s.VMClockNsec % 1e9,
	}
	if s.HasICount {
		j.ICount = &s.ICount
	}
	return j
}

func bitmapJSON(b qcow2.BitmapInfo) jsonBitmap {
	j := jsonBitmap{Flags: []string{}, Name: b.Name, Granularity: b.Granularity}
	if b.InUse {
		j.Flags = append(j.Flags, "in-use")
	}
	if b.Auto {
		j.Flags = append(j.Flags, "auto")
	}
	return j
}

func encryptJSON(e *qcow2.EncryptionInfo) *jsonEncrypt {
	if e == nil {
		return nil
	}
	j := &jsonEncrypt{Format: e.Format}
	l := e.LUKS
	if l == nil {
		return j
	}
	j.IVGenAlg, j.IVGenHash, j.HashAlg = l.IVGenAlg, l.IVGenHash, l.HashAlg
	j.CipherAlg, j.CipherMode, j.UUID = l.CipherAlg, l.CipherMode, l.UUID
	j.PayloadOffset, j.MasterKeyIters = &l.PayloadOffset, &l.MasterKeyIters
	for _, s := range l.Slots {
		slot := jsonSlot{Active: s.Active, KeyOffset: s.KeyOffset}
		if s.Active {
			slot.Iters, slot.Stripes = &s.Iters, &s.Stripes
		}
		j.Slots = append(j.Slots, slot)
	}
	return j
}

func (a *app) printInfos(list []*imageInfo) {
	for i, info := range list {
		if i > 0 {
			a.printf("\n")
		}
		a.printInfo(info)
	}
}

func (a *app) printInfo(info *imageInfo) {
	a.printf("image: %s\nfile format: %s\n", info.Filename, info.Format)
	a.printf("virtual size: %s (%d bytes)\n", humanSize(uint64(info.VirtualSize)), info.VirtualSize)
	if info.ActualSize == nil {
		a.printf("disk size: unavailable\n")
	} else {
		a.printf("disk size: %s\n", humanSize(uint64(*info.ActualSize)))
	}
	if info.Encrypted {
		a.printf("encrypted: yes\n")
	}
	if info.ClusterSize != 0 {
		a.printf("cluster_size: %d\n", info.ClusterSize)
	}
	if info.Dirty != nil && *info.Dirty {
		a.printf("cleanly shut down: no\n")
	}
	if info.Backing != "" {
		a.printf("backing file: %s", info.Backing)
		if info.FullBacking != info.Backing {
			a.printf(" (actual path: %s)", info.FullBacking)
		}
		a.printf("\n")
		if info.BackingFmt != "" {
			a.printf("backing file format: %s\n", info.BackingFmt)
		}
	}
	if len(info.Snapshots) > 0 {
		a.printf("Snapshot list:\n")
		a.printSnapshots(info.Snapshots)
	}
	if info.FormatDetail != nil {
		a.printf("Format specific information:\n")
		a.printQCOW2(&info.FormatDetail.Data)
	}
}

func (a *app) printSnapshots(list []jsonSnapshot) {
	const row = "%s %s %8s%20s%13s%11s\n"
	a.printf(row, pad("ID", 9), pad("TAG", 16), "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
	for _, s := range list {
		icount := ""
		if s.ICount != nil {
			icount = fmt.Sprint(*s.ICount)
		}
		clock := fmt.Sprintf("%02d:%02d:%02d.%03d", s.VMClockSec/3600, s.VMClockSec/60%60, s.VMClockSec%60, s.VMClockNsec/1e6)
		a.printf(row, pad(s.ID, 9), pad(s.Name, 16), humanSize(s.VMStateSize), time.Unix(s.DateSec, 0).Format(time.DateTime), clock, icount)
	}
}

// pad fills a column of n bytes, which is how C counts.
func pad(s string, n int) string { return s + strings.Repeat(" ", max(n-len(s), 0)) }

func (a *app) printQCOW2(d *qcow2Data) {
	field := func(name string, value any) { a.printf("    %s: %v\n", name, value) }
	flag := func(name string, value *bool) {
		if value != nil {
			field(name, *value)
		}
	}
	field("compat", d.Compat)
	field("compression type", d.CompressionType)
	flag("lazy refcounts", d.LazyRefcounts)
	if len(d.Bitmaps) > 0 {
		a.printf("    bitmaps:\n")
		for i, b := range d.Bitmaps {
			a.printf("        [%d]:\n            flags:\n", i)
			for j, f := range b.Flags {
				a.printf("                [%d]: %s\n", j, f)
			}
			a.printf("            name: %s\n            granularity: %d\n", b.Name, b.Granularity)
		}
	}
	field("refcount bits", d.RefcountBits)
	if d.Encrypt != nil {
		a.printEncrypt(d.Encrypt)
	}
	if d.DataFile != nil {
		field("data file", *d.DataFile)
	}
	flag("data file raw", d.DataFileRaw)
	flag("corrupt", d.Corrupt)
	flag("extended l2", d.ExtendedL2)
}

func (a *app) printEncrypt(e *jsonEncrypt) {
	a.printf("    encrypt:\n")
	text := func(name, value string) {
		if value != "" {
			a.printf("        %s: %s\n", name, value)
		}
	}
	text("ivgen alg", e.IVGenAlg)
	text("ivgen hash alg", e.IVGenHash)
	text("hash alg", e.HashAlg)
	text("cipher alg", e.CipherAlg)
	text("uuid", e.UUID)
	text("format", e.Format)
	text("cipher mode", e.CipherMode)
	if len(e.Slots) > 0 {
		a.printf("        slots:\n")
	}
	for i, s := range e.Slots {
		a.printf("            [%d]:\n                active: %v\n", i, s.Active)
		if s.Iters != nil {
			a.printf("                iters: %d\n", *s.Iters)
		}
		a.printf("                key offset: %d\n", s.KeyOffset)
		if s.Stripes != nil {
			a.printf("                stripes: %d\n", *s.Stripes)
		}
	}
	if e.PayloadOffset != nil {
		a.printf("        payload offset: %d\n        master key iters: %d\n", *e.PayloadOffset, *e.MasterKeyIters)
	}
}
