package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/image"
	"github.com/droverproject/drover/qcow2"
)

func (a *app) convertCommand() *cobra.Command {
	var c conversion
	cmd := &cobra.Command{
		Use:   "convert [flags] FILE... TARGET",
		Short: "Copy a disk to another image, format or layout",
		Long: `Copy the disk in FILE to a new image TARGET; of several FILEs, one after
another. Ranges that read as zeroes take no space in the target.

When convert has ended with exit code 0, the target is on the disk: a crash
of the host does not harm it any more. 'drover create -f FMT -o help' lists the
options of a target.

A FILE or TARGET of "-" is standard input or output. An image that is written to
a pipe is whole in one pass; of one that is read from a pipe a raw disk is taken
as it comes, and anything else goes through a temporary file.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c.app = a
			c.sparseGiven = cmd.Flags().Changed("sparse-size")
			c.backingGiven = cmd.Flags().Changed("backing")
			c.formatGiven = cmd.Flags().Changed("target-format")
			return c.run(cmd.Context(), args)
		},
	}
	c.src.add(cmd)
	f := cmd.Flags()
	f.StringVarP(&c.format, "target-format", "O", "raw", "`format` of the target: raw or qcow2")
	f.StringArrayVarP(&c.options, "options", "o", nil, "`options` of the target's format: NAME=VALUE,...")
	f.BoolVarP(&c.compress, "compress", "c", false, "compress the target")
	f.StringVarP(&c.snapshot, "load-snapshot", "l", "", "copy `SNAPSHOT` instead of the disk, by ID or name")
	f.StringVarP(&c.backing, "backing", "B", "", "`FILE` that holds what the target does not: what stands below the source")
	f.StringVarP(&c.backingFormat, "backing-format", "F", "", "`format` of the backing file")
	f.BoolVarP(&c.noCreate, "no-create", "n", false, "write to a target that exists, and keep what it is")
	f.BoolVar(&c.targetZero, "target-is-zero", false, "the target reads as zeroes (needs -n)")
	f.BoolVar(&c.bitmaps, "bitmaps", false, "copy the dirty bitmaps too")
	f.BoolVar(&c.skipBroken, "skip-broken-bitmaps", false, "leave out bitmaps that are inconsistent (needs --bitmaps)")
	f.BoolVar(&c.targetOpts, "target-image-opts", false, "TARGET is given as options: driver=FMT,file.filename=NAME (needs -n)")
	f.StringVarP(&c.sparse, "sparse-size", "S", "4k", "leave out zeroes in units of `SIZE`; 0 writes every byte out")
	f.BoolVar(&c.salvage, "salvage", false, "take what cannot be read for zeroes")
	f.StringVarP(&c.rate, "rate-limit", "r", "", "write at most `RATE` bytes a second")
	f.StringVarP(&c.workers, "parallel", "m", "8", "`number` of reads at a time, 1 to 16")
	f.BoolVarP(&c.outOfOrder, "out-of-order", "W", false, "write in the order in which reads end")
	f.BoolVarP(&c.offload, "copy-offload", "C", false, "have the host copy inside the kernel where it can, zeroes in the data and all")
	cacheFlag(f, &c.cache)
	f.StringVarP(&c.sourceCache, "source-cache", "T", "", "cache `mode` of qemu-img for the source (accepted, without effect)")
	addProgress(f, &c.progress)
	resultFlag(cmd, &c.output)
	f.StringVar(&c.spool, "spool", "", "keep a stream that is not read in order in a temporary file in `DIR`")
	f.BoolVarP(&c.quiet, "quiet", "q", false, "print nothing but errors")
	c.src.policy.add(f)
	return cmd
}

// conversion is one run of convert.
type conversion struct {
	*app
	src                              source
	format                           string
	options                          []string
	compress, noCreate, targetZero   bool
	snapshot, backing, backingFormat string
	sparse, rate, workers            string
	sparseGiven, backingGiven        bool
	bitmaps, skipBroken, targetOpts  bool
	formatGiven                      bool
	output                           string
	written                          source // the target

	spool                        string
	inputs                       []*os.File // that were opened as streams
	spooled                      []string   // temporary files
	incoming                     io.Reader  // a raw disk of unknown length, in place of sources
	salvage, outOfOrder, offload bool
	cache, sourceCache           string
	quiet                        bool
	progress                     progressFlag
	target                       string
	creator                      creator
	known                        []createOption
	sources                      []block.Device
	opened                       []block.Device
	copying                      image.ConvertOptions
}

func (c *conversion) run(ctx context.Context, args []string) (err error) {
	c.creator = creator{app: c.app, format: c.format, optionTexts: c.options, backing: c.backing, backingFormat: c.backingFormat,
		backingGiven: c.backingGiven, quiet: true}
	var known bool
	c.known, known = map[string][]createOption{"raw": rawOptions, "qcow2": qcow2Options}[c.format]
	if err := c.check(args); err != nil {
		return err
	}
	if c.creator.wantsHelp() && known {
		c.creator.printOptions(c.known, len(args) > 1)
		return nil
	}
	if len(args) < 2 {
		return errorf("Must specify image file name")
	}
	c.target = args[len(args)-1]
	defer func() { err = errors.Join(err, c.closeSources(), c.closeInputs()) }()
	if err := c.openSources(ctx, args[:len(args)-1]); err != nil {
		return err
	}
	if err := c.checkBitmaps(); err != nil {
		return err
	}
	if !known {
		return errorf("Unknown file format '%s'", c.format)
	}
	switch {
	case c.incoming != nil:
		return c.takeStream(ctx, c.incoming)
	case !c.targetOpts && c.isStream(c.target, "/dev/stdout"):
		return c.stream(ctx)
	}
	return c.convert(ctx)
}

// check refuses flags that do not go together.
func (c *conversion) check(args []string) error {
	if err := checkOutput(c.output); err != nil {
		return err
	}
	n, err := parseSize("buffer size for sparse output", c.sparse)
	if err != nil {
		return err
	}
	if n%512 != 0 || n > image.MaxSparse {
		return errorf("Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to %d. "+
			"Select 0 to disable sparse detection (fully allocates output).", image.MaxSparse)
	}
	c.copying.Sparse = n
	if c.copying.Workers, err = strconv.Atoi(c.workers); err != nil || c.copying.Workers < 1 || c.copying.Workers > 16 {
		return errorf("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16")
	}
	if c.rate != "" {
		if c.copying.Rate, err = parseSize("rate limit", c.rate); err != nil {
			return err
		}
	}
	switch {
	case c.offload && c.compress:
		return errorf("Cannot enable copy offloading when -c is used")
	case c.offload && c.sparseGiven:
		return errorf("Cannot enable copy offloading when -S is used")
	case c.offload && c.salvage:
		return errorf("Cannot use copy offloading in salvaging mode")
	case c.skipBroken && !c.bitmaps:
		return errorf("Use of --skip-broken-bitmaps requires --bitmaps")
	case c.targetOpts && !c.noCreate:
		return errorf("--target-image-opts requires use of -n flag")
	case c.noCreate && len(c.options) > 0:
		return errorf("-o has no effect when skipping image creation")
	case c.targetZero && !c.noCreate:
		return errorf("--target-is-zero requires use of -n flag")
	case len(args) > 2 && c.snapshot != "":
		return errorf("No support for concatenating multiple snapshot")
	}
	if checkCache(c.cache) != nil {
		return errorf("Invalid cache option: %s", c.cache)
	}
	if checkCache(c.sourceCache) != nil {
		return errorf("Invalid source cache option: %s", c.sourceCache)
	}
	return nil
}

func (c *conversion) openSources(ctx context.Context, names []string) error {
	for _, name := range names {
		src := c.src
		if err := src.set(name); err != nil {
			return err
		}
		var dev block.Device
		var err error
		if !src.imageOpts && c.isStream(name, "/dev/stdin") {
			var raw io.Reader
			if dev, raw, err = c.fromStandardInput(ctx, name); err == nil && raw != nil {
				if len(names) > 1 {
					return errorf("A stream of unknown length must be the only source")
				}
				c.incoming = raw
				return nil
			}
		} else {
			dev, err = c.openDevice(ctx, &src, true)
		}
		if err != nil {
			return err
		}
		c.opened = append(c.opened, dev)
		if c.snapshot != "" {
			if dev, err = openSnapshot(ctx, dev, c.snapshot); err != nil {
				return err
			}
			c.opened = append(c.opened, dev)
		}
		c.sources = append(c.sources, dev)
	}
	return nil
}

func openSnapshot(ctx context.Context, dev block.Device, name string) (block.Device, error) {
	ref, err := image.ParseSnapshotRef(name)
	if err != nil {
		return nil, thenf(badSnapshotParameter(name), "Failed in parsing snapshot param '%s'", name)
	}
	view, err := image.OpenSnapshot(ctx, dev, ref)
	switch {
	case errors.Is(err, qcow2.ErrNoSnapshot):
		return nil, errorf("Failed to load snapshot: Can't find snapshot")
	case errors.Is(err, image.ErrNoSnapshots):
		return nil, errorf("Failed to load snapshot: Device '%s' does not support internal snapshots", "")
	case err != nil:
		return nil, errorf("Failed to load snapshot: %w", err)
	}
	return view, nil
}

// closeSources closes snapshots before the images that they are in.
func (c *conversion) closeSources() error {
	var errs []error
	for _, dev := range slices.Backward(c.opened) {
		errs = append(errs, dev.Close())
	}
	return errors.Join(errs...)
}

func (c *conversion) convert(ctx context.Context) (err error) {
	var total int64
	for _, s := range c.sources {
		total += s.Size()
	}
	if err := c.prepare(total); err != nil {
		return err
	}
	target, err := c.openTarget(ctx)
	if err != nil {
		return err
	}
	closed := false
	defer func() {
		if !closed {
			err = errors.Join(err, target.Close())
		}
	}()
	if err := c.fit(target, total); err != nil {
		return err
	}
	p := c.startProgress("convert", c.progress, c.quiet || c.output == "json")
	c.copying.Progress = p.set
	c.copying.Compress, c.copying.OutOfOrder, c.copying.Offload = c.compress, c.outOfOrder, c.offload
	c.warnOfLosses()
	err = image.Convert(ctx, target, c.sources, c.copying)
	if err != nil {
		err = convertError(err)
	} else if c.bitmaps {
		err = c.copyBitmaps(ctx, target)
	}
	if err != nil {
		p.newline()
		return err
	}
	closed = true
	if err := errors.Join(target.Close(), c.syncNames()); err != nil {
		p.newline()
		return err
	}
	p.end()
	if c.output == "json" && !c.quiet {
		return c.printResult(ctx, "convert", p.began, c.written)
	}
	return nil
}

// prepare makes the target, unless it is there.
func (c *conversion) prepare(total int64) error {
	cr := &c.creator
	cr.file = c.target
	if c.noCreate {
		if c.backing != "" && c.format != "qcow2" {
			return errorf("Backing file not supported for file format '%s'", c.format)
		}
		return c.checkBacking()
	}
	for _, text := range c.options {
		if slices.Contains(splitOptions(text), "") {
			return errorf("Invalid option list: %s", text)
		}
	}
	var err error
	if cr.secrets, err = c.src.objects.parse(); err != nil {
		return err
	}
	if err := cr.parseOptions(c.known); err != nil {
		return err
	}
	if c.compress && cr.encrypts() {
		return errorf("Compression and encryption not supported at the same time")
	}
	if c.compress {
		if c.format != "qcow2" {
			return errorf("Compression not supported for this file format")
		}
		if p := cr.options["preallocation"]; p != "" && p != "off" {
			return errorf("Compression and preallocation not supported at the same time")
		}
	}
	if c.backingFormat != "" && c.backing == "" && cr.options["backing_file"] == "" {
		return errorf("%s: error while converting %s: Backing format cannot be used without backing file", c.target, c.format)
	}
	if err := cr.backingOptions(); err != nil {
		return err
	}
	c.backing, c.backingFormat = cr.backing, cr.backingFormat
	if err := c.checkBacking(); err != nil {
		return err
	}
	cr.options["size"] = strconv.FormatInt(total, 10)
	cr.size, cr.hasSize = total, true
	if err := cr.create(context.Background()); err != nil {
		return errorf("%s: error while converting %s: %s", c.target, c.format, createReason(c.target, err))
	}
	return nil
}

// encrypts reports whether the image is to be encrypted.
func (c *creator) encrypts() bool {
	return c.options["encryption"] == "on" || c.options["encrypt.format"] != ""
}

func (c *conversion) checkBacking() error {
	switch {
	case c.backing == "":
		return nil
	case len(c.sources) > 1:
		return errorf("Having a backing file for the target makes no sense when concatenating multiple input images")
	case c.backingFormat == "":
		return errorf("Use of backing file requires explicit backing format")
	}
	return nil
}

// openTarget opens the target for writing. What stands below it is what the user said, whatever the policy.
func (c *conversion) openTarget(ctx context.Context) (block.Device, error) {
	target := source{format: c.format, policy: c.src.policy, objects: c.src.objects, imageOpts: c.targetOpts}
	if c.targetOpts && !c.formatGiven {
		target.format = ""
	}
	if err := target.set(c.target); err != nil {
		return nil, err
	}
	if id, ok := c.creator.options["encrypt.key-secret"]; ok {
		target.node["encrypt.key-secret"] = id
	}
	c.written = target
	o := target.openOptions()
	o.ReadOnly, o.DataFile, o.WriteBehind = false, c.creator.dataPath, true
	o.OnRepair = c.tellRepair
	if c.backing != "" {
		o.Backing = &block.Backing{Name: block.ResolveName(c.target, c.backing), Format: c.backingFormat}
	}
	dev, err := block.Open(ctx, c.target, o)
	if err != nil {
		return nil, openError(c.target, err)
	}
	return dev, nil
}

// fit finds out how the target is to be written.
func (c *conversion) fit(target block.Device, total int64) error {
	if target.Size() < total {
		return errorf("output file is smaller than input file")
	}
	im, _ := block.As[*qcow2.Image](target)
	if c.bitmaps && (im == nil || im.Version() < 3) {
		return errorf("Format driver '%s' does not support bitmaps", target.Info().Format)
	}
	if c.compress && im == nil {
		return errorf("Compression not supported for this file format")
	}
	var below block.Device
	if im != nil {
		below = im.Backing()
		c.copying.ClusterSize = im.ClusterSize()
	}
	c.copying.Zero = (!c.noCreate || c.targetZero) && below == nil
	if c.targetZero && below != nil {
		return errorf("Cannot use --target-is-zero when the destination image has a backing file")
	}
	if c.backing != "" && below != nil {
		c.copying.Backed, c.copying.BackingSize = true, below.Size()
	}
	return nil
}

// checkBitmaps finds out whether the source has bitmaps that can be copied.
func (c *conversion) checkBitmaps() error {
	if !c.bitmaps || c.incoming != nil {
		return nil
	}
	if len(c.sources) > 1 {
		return errorf("Copying bitmaps only possible with single source")
	}
	im, ok := block.As[*qcow2.Image](c.opened[0])
	if !ok {
		return errorf("Source lacks bitmap support")
	}
	list, err := im.Bitmaps()
	if err != nil {
		return err
	}
	for _, b := range slices.Backward(list) { // qemu-img's order
		if b.InUse && !c.skipBroken {
			return errorf("Cannot copy inconsistent bitmap '%s'\nTry --skip-broken-bitmaps, or use '%s bitmap --remove' to delete it", b.Name, c.name)
		}
	}
	return nil
}

// copyBitmaps copies the dirty bitmaps when the target has its content.
func (c *conversion) copyBitmaps(ctx context.Context, target block.Device) error {
	dst, ok := block.As[*qcow2.Image](target)
	src, isImage := block.As[*qcow2.Image](c.opened[0])
	if !ok || !isImage {
		return errorf("Format driver '%s' does not support bitmaps", target.Info().Format)
	}
	list, err := src.Bitmaps()
	if err != nil {
		return err
	}
	for _, b := range slices.Backward(list) {
		if b.InUse {
			c.say("warning: Skipping inconsistent bitmap '%s'", b.Name)
		}
	}
	if err := image.CopyBitmaps(ctx, dst, src); err != nil {
		return err
	}
	return dst.Flush(ctx)
}

// warnOfLosses has what cannot be read be reported.
func (c *conversion) warnOfLosses() {
	if !c.salvage {
		return
	}
	var mu sync.Mutex
	c.copying.Salvage = func(off int64, err error) {
		if c.quiet {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		c.say("warning: error while reading offset %d: %s", off, readReason(err))
	}
}

func convertError(err error) error {
	var status *image.StatusError
	var read *image.ReadError
	var write *image.WriteError
	switch {
	case errors.As(err, &status):
		return errorf("error while reading block status: %s", readReason(status.Err))
	case errors.As(err, &read):
		return errorf("error while reading at byte %d: %s", read.Off, readReason(read.Err))
	case errors.As(err, &write) && errors.Is(write.Err, qcow2.ErrDataFile):
		return errorf("error while writing at byte %d: Operation not supported", write.Off)
	case errors.As(err, &write):
		return errorf("error while writing at byte %d: %s", write.Off, readReason(write.Err))
	}
	return err
}

// syncNames makes the names of the target and of its data file durable.
func (c *conversion) syncNames() error {
	err := syncFolder(c.target)
	if c.creator.dataPath != "" {
		err = errors.Join(err, syncFolder(c.creator.dataPath))
	}
	return err
}

// syncFolder makes the name of a new file durable.
func syncFolder(name string) error {
	path, err := block.PlainName(name)
	if errors.Is(err, block.ErrProtocol) {
		return nil // it has no name in a folder
	}
	if err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("making the name of %q durable: %w", name, err)
	}
	// Some file systems cannot sync a folder, and then need no such thing.
	_ = dir.Sync()
	return dir.Close()
}
