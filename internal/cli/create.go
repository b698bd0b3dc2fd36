package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
)

func (a *app) createCommand() *cobra.Command {
	var c creator
	cmd := &cobra.Command{
		Use:   "create [flags] FILE [SIZE]",
		Short: "Create an image",
		Long: `Create an image. An existing FILE is replaced, unless somebody uses it.

SIZE is a number of bytes with an optional suffix k, M, G, T, P or E. An image
with a backing file may leave it out and is then as large as that.
'drover create -f qcow2 -o help' lists the options of a format.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c.app = a
			c.backingGiven = cmd.Flags().Changed("backing")
			return c.run(cmd.Context(), args)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&c.format, "format", "f", "raw", "`format` of the image: raw or qcow2")
	f.StringVarP(&c.backing, "backing", "b", "", "`FILE` that holds what the image does not")
	f.StringVarP(&c.backingFormat, "backing-format", "F", "", "`format` of the backing file")
	f.BoolVarP(&c.unsafe, "unsafe", "u", false, "do not open the backing file (SIZE is then needed)")
	f.StringArrayVarP(&c.optionTexts, "options", "o", nil, "`options` of the format: NAME=VALUE,...")
	f.BoolVarP(&c.quiet, "quiet", "q", false, "print nothing but errors")
	resultFlag(cmd, &c.output)
	c.objects.add(f)
	return cmd
}

// creator is one run of create.
type creator struct {
	*app
	format, backing, backingFormat string
	backingGiven, unsafe, quiet    bool
	output                         string
	optionTexts                    []string

	file    string
	size    int64
	hasSize bool
	options map[string]string
	objects objectFlags
	secrets secrets

	dataPath  string // of the external data file; "" for none
	measuring bool   // no image is to be made
}

// createOption describes an option of a format. The order of a format's options is that in which they are reported.
type createOption struct {
	name, kind, help string
	value            string // default that is reported; "" is reported only when set
}

var rawOptions = []createOption{
	{"size", "size", "Virtual disk size", ""},
	nocowOption,
	{"preallocation", "str", "Preallocation mode (allowed values: off, falloc, full)", ""},
	extentHintOption,
}

// Hints for the host's file system, which qemu-img has as well. They are understood and have no effect here.
var (
	nocowOption      = createOption{"nocow", "bool", "Turn off copy-on-write (valid only on btrfs)", ""}
	extentHintOption = createOption{"extent_size_hint", "size", "Extent size hint for the image file, 0 to disable", ""}
)

var qcow2Options = append(slices.Clone(encryptCreateOptions), []createOption{
	{"cluster_size", "size", "qcow2 cluster size", "65536"},
	{"extended_l2", "bool", "Extended L2 tables", "off"},
	{"preallocation", "str", "Preallocation mode (allowed values: off, metadata, falloc, full)", ""},
	{"compression_type", "str", "Compression method used for image cluster compression", "zlib"},
	{"size", "size", "Virtual disk size", ""},
	{"compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])", ""},
	{"backing_file", "str", "File name of a base image", ""},
	{"backing_fmt", "str", "Image format of the base image", ""},
	{"data_file", "str", "File name of an external data file", ""},
	{"data_file_raw", "bool", "The external data file must stay valid as a raw image", ""},
	{"lazy_refcounts", "bool", "Postpone refcount updates", "off"},
	{"refcount_bits", "num", "Width of a reference count entry in bits", "16"},
	nocowOption,
	extentHintOption,
}...)

func (c *creator) run(ctx context.Context, args []string) error {
	known, ok := map[string][]createOption{"raw": rawOptions, "qcow2": qcow2Options}[c.format]
	if c.wantsHelp() {
		if !ok {
			return errorf("Unknown file format '%s'", c.format)
		}
		c.printOptions(known, len(args) > 0)
		return nil
	}
	for _, text := range c.optionTexts {
		if slices.Contains(splitOptions(text), "") {
			return errorf("Invalid option list: %s", text)
		}
	}
	if err := c.arguments(args); err != nil {
		return err
	}
	var err error
	if c.secrets, err = c.objects.parse(); err != nil {
		return err
	}
	if !ok {
		return errorf("%s: Unknown file format '%s'", c.file, c.format)
	}
	for _, step := range []func() error{
		c.checkName,
		func() error { return c.parseOptions(known) },
		c.backingOptions,
		func() error { return c.findSize(ctx) },
	} {
		if err := step(); err != nil {
			return errorf("%s: %w", c.file, err)
		}
	}
	if err := checkOutput(c.output); err != nil {
		return err
	}
	began := time.Now()
	if !c.quiet && c.output != "json" {
		c.printf("Formatting '%s', fmt=%s%s\n", c.file, c.format, c.describe(known))
	}
	if err := c.create(ctx); err != nil {
		return errorf("%s: %s", c.file, createReason(c.file, err))
	}
	if c.output == "json" && !c.quiet {
		return c.printResultOf(ctx, "create", began, c.file, c.format)
	}
	return nil
}

func (c *creator) wantsHelp() bool {
	for _, text := range c.optionTexts {
		for _, part := range splitOptions(text) {
			if part == "help" || part == "?" {
				return true
			}
		}
	}
	return false
}

func (c *creator) arguments(args []string) error {
	switch len(args) {
	case 0:
		return usagef("Expecting image file name")
	case 1:
	default:
		n, err := parseSize("image size", args[1])
		if err != nil {
			return err
		}
		c.size, c.hasSize = n, true
	}
	if len(args) > 2 {
		return usagef("Unexpected argument: %s", args[2])
	}
	c.file = args[0]
	return nil
}

// checkName refuses names that are not those of files.
func (c *creator) checkName() error {
	if _, err := block.PlainName(c.file); !errors.Is(err, block.ErrProtocol) {
		return nil
	}
	if _, err := block.ParseFileName(c.file); err != nil {
		return errors.New(reason(c.file, err))
	}
	return nil
}

func (c *creator) parseOptions(known []createOption) error {
	c.options = make(map[string]string)
	for _, text := range c.optionTexts {
		for _, part := range splitOptions(text) {
			key, value, given := strings.Cut(part, "=")
			if !given {
				value = "on" // a flag may stand for itself
			}
			if err := c.setOption(known, key, value); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *creator) setOption(known []createOption, key, value string) error {
	for _, o := range known {
		if o.name != key {
			continue
		}
		text, err := o.normalize(value)
		if err != nil {
			return err
		}
		c.options[key] = text
		return nil
	}
	return errorf("Invalid parameter '%s'", key)
}

// normalize checks the value of an option and returns it as it is reported.
func (o createOption) normalize(value string) (string, error) {
	switch o.kind {
	case "bool":
		if value != "on" && value != "off" {
			return "", errorf("Parameter '%s' expects 'on' or 'off'", o.name)
		}
	case "size":
		n, err := block.ParseSize(value)
		if err != nil {
			return "", errorf("Parameter '%s' expects a non-negative number below 2^64\n"+
				"Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"+
				"and exabytes, respectively.", o.name)
		}
		return strconv.FormatInt(n, 10), nil
	case "num":
		n, err := strconv.ParseUint(value, 0, 63)
		if err != nil {
			return "", errorf("Parameter '%s' expects a number", o.name)
		}
		return strconv.FormatUint(n, 10), nil
	}
	return value, nil
}

// backingOptions brings -b and -F together with their long forms in -o.
func (c *creator) backingOptions() error {
	if c.format != "qcow2" && c.backing != "" {
		return errorf("Backing file not supported for file format '%s'", c.format)
	}
	if c.format != "qcow2" && c.backingFormat != "" {
		return errorf("Backing file format not supported for file format '%s'", c.format)
	}
	if c.backing == "" && c.backingGiven {
		return errorf("Expected backing file name, got empty string")
	}
	if c.backing != "" {
		c.options["backing_file"] = c.backing
	}
	if c.backingFormat != "" {
		c.options["backing_fmt"] = c.backingFormat
	}
	c.backing, c.backingFormat = c.options["backing_file"], c.options["backing_fmt"]
	if c.backing != "" && c.backing == c.file {
		return errorf("Error: Trying to create an image with the same filename as the backing file")
	}
	return nil
}

// findSize settles the size, from the backing file if need be, which it looks at unless told not to.
func (c *creator) findSize(ctx context.Context) error {
	if text, ok := c.options["size"]; ok {
		if c.hasSize {
			return errorf("The image size must be specified only once")
		}
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return fmt.Errorf("size %s: %w", text, err)
		}
		c.size, c.hasSize = n, true
	}
	if c.backing != "" && !c.unsafe {
		size, err := c.backingSize(ctx)
		if err != nil {
			return err
		}
		if !c.hasSize {
			c.size, c.hasSize = size, true
		}
	}
	if c.backing != "" && c.backingFormat == "" {
		return c.noBackingFormat()
	}
	if !c.hasSize {
		return errorf("Image creation needs a size parameter")
	}
	c.options["size"] = strconv.FormatInt(c.size, 10)
	return nil
}

// backingSize opens the backing file and returns the size of its disk. What stands below it is not opened: its size
// does not depend on that.
func (c *creator) backingSize(ctx context.Context) (int64, error) {
	const hint = "Could not open backing image."
	if err := checkFormat(c.backingFormat); err != nil {
		return 0, errorf("%w\n%s", err, hint)
	}
	name := c.backing
	if !hasProtocol(name) {
		name = block.ResolveName(c.file, name)
	}
	o := block.OpenOptions{
		Format: c.backingFormat, AllowProbe: true, ReadOnly: true, ForceShare: true, NoBacking: true, NoData: true,
	}
	dev, err := openNamed(ctx, name, o)
	if err != nil {
		return 0, errorf("%s\n%s", openReason(name, err), hint)
	}
	return dev.Size(), dev.Close()
}

// openNamed opens what a user's name stands for.
func openNamed(ctx context.Context, name string, o block.OpenOptions) (block.Device, error) {
	if _, err := block.PlainName(name); errors.Is(err, block.ErrProtocol) {
		node, err := block.ParseName(name, o.Format)
		if err != nil {
			return nil, err
		}
		o.Node, o.Format = node, ""
	}
	return block.Open(ctx, name, o)
}

// noBackingFormat refuses a backing file of unsaid format, and helps with it where looking is allowed.
func (c *creator) noBackingFormat() error {
	const msg = "Backing file specified without backing format"
	if c.unsafe {
		return errors.New(msg)
	}
	file, err := block.OpenFile(block.ResolveName(c.file, c.backing), block.OpenOptions{ReadOnly: true, ForceShare: true})
	if err != nil {
		return errors.New(msg)
	}
	format, err := block.ProbeFile(file)
	if err = errors.Join(err, file.Close()); err != nil {
		return errors.New(msg)
	}
	return errorf("%s\nDetected format of %s.", msg, format)
}

// describe lists the options of the image as they are.
func (c *creator) describe(known []createOption) string {
	var b strings.Builder
	for _, o := range known {
		value, ok := c.options[o.name]
		if !ok {
			value = o.value
		}
		if value != "" || ok {
			fmt.Fprintf(&b, " %s=%s", o.name, strings.ReplaceAll(value, ",", ",,"))
		}
	}
	return b.String()
}

// hostOptions are those that the host's file takes. raw has its preallocation from there, too.
func (c *creator) hostOption(o createOption) bool {
	return o == nocowOption || o == extentHintOption || c.format == block.FormatRaw && o.name == "preallocation"
}

// printOptions lists the options of the format, and if it is known where the image will be, those of the place.
func (c *creator) printOptions(known []createOption, placed bool) {
	kinds := map[string]string{"bool": "bool (on/off)"}
	if placed {
		c.printf("Supported options:\n")
	} else {
		c.printf("Supported %s options:\n", c.format)
		known = slices.DeleteFunc(slices.Clone(known), c.hostOption)
		defer c.printf("\nThe protocol level may support further options.\nSpecify the target filename to include those options.\n")
	}
	sorted := slices.SortedFunc(slices.Values(known), func(a, b createOption) int { return strings.Compare(a.name, b.name) })
	for _, o := range sorted {
		kind := o.kind
		if k, ok := kinds[kind]; ok {
			kind = k
		}
		c.printf("  %-22s - %s\n", fmt.Sprintf("%s=<%s>", o.name, kind), o.help)
	}
}

func (c *creator) create(ctx context.Context) error {
	if err := c.checkHint(); err != nil {
		return err
	}
	if c.format == "raw" {
		return c.createRaw()
	}
	o, err := c.qcow2Options()
	if err != nil {
		return err
	}
	if err := o.Validate(); err != nil {
		return err // before an existing file is emptied for nothing
	}
	if o.DataFile != "" {
		return c.createWithData(ctx, o)
	}
	file, err := createFile(c.file)
	if err != nil {
		return err
	}
	return errors.Join(qcow2.Create(ctx, file, o), file.Close())
}

func (c *creator) createRaw() error {
	mode := c.options["preallocation"]
	if !slices.Contains([]string{"", "off", "falloc", "full"}, mode) {
		return notAccepted("preallocation", mode)
	}
	file, err := createFile(c.file)
	if err != nil {
		return err
	}
	size := (c.size + storage.SectorSize - 1) &^ (storage.SectorSize - 1)
	return errors.Join(fillRaw(file, max(size, c.size), mode), file.Close())
}

// fillRaw gives a new file its length and, by mode, its space.
func fillRaw(file storage.File, size int64, mode string) error {
	if err := file.Truncate(size); err != nil {
		return err
	}
	switch mode {
	case "falloc":
		return file.Preallocate(0, size)
	case "full":
		buf := make([]byte, min(size, 1<<20))
		for off := int64(0); off < size; off += int64(len(buf)) {
			if _, err := file.WriteAt(buf[:min(size-off, int64(len(buf)))], off); err != nil {
				return err
			}
		}
		return file.Sync()
	}
	return nil
}

func createFile(name string) (storage.File, error) {
	path, err := block.PlainName(name)
	if errors.Is(err, block.ErrProtocol) {
		return openInPlace(name)
	}
	if err != nil {
		return nil, err
	}
	file, err := storage.CreateFile(path, storage.OpenOptions{})
	if err != nil {
		return nil, err
	}
	return file, nil
}

// openInPlace opens what cannot be created, for an image that begins with nothing of what is there.
func openInPlace(name string) (storage.File, error) {
	node, err := block.ParseFileName(name)
	if err != nil {
		return nil, err
	}
	file, err := block.OpenFile(name, block.OpenOptions{Node: node})
	if err != nil {
		return nil, errorf("Protocol driver '%s' does not support image creation, and opening the image failed: %s",
			node["driver"], openReason(name, err))
	}
	if err := storage.Zero(file, 0, storage.SectorSize, false); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// qcow2Options checks the options in the order and in the words of qemu-img.
func (c *creator) qcow2Options() (qcow2.CreateOptions, error) {
	o := qcow2.CreateOptions{
		Size: c.size, BackingFile: c.backing, BackingFormat: c.backingFormat,
		ExtendedL2: c.options["extended_l2"] == "on", LazyRefcounts: c.options["lazy_refcounts"] == "on",
		ClusterSize: 65536, RefcountBits: 16, Version: 3,
	}
	for _, step := range []func(*qcow2.CreateOptions) error{
		c.setEncryption, c.setPreallocation, c.setVersion, c.setCompression, c.setClusterSize, c.checkBacking, c.checkVersion,
		c.setDataFile, c.checkCompression,
	} {
		if err := step(&o); err != nil {
			return o, err
		}
	}
	return o, nil
}

func notAccepted(name, value string) error {
	return errorf("Parameter '%s' does not accept value '%s'", name, value)
}

func (c *creator) setPreallocation(o *qcow2.CreateOptions) error {
	switch value := c.options["preallocation"]; value {
	case "", "off":
		o.Preallocation = qcow2.PreallocOff
	case "metadata":
		o.Preallocation = qcow2.PreallocMetadata
	case "falloc":
		o.Preallocation = qcow2.PreallocFalloc
	case "full":
		o.Preallocation = qcow2.PreallocFull
	default:
		return notAccepted("preallocation", value)
	}
	return nil
}

func (c *creator) setVersion(o *qcow2.CreateOptions) error {
	switch value := c.options["compat"]; value {
	case "", "1.1", "v3":
		o.Version = 3
	case "0.10", "v2":
		o.Version = 2
	default:
		return notAccepted("version", value)
	}
	return nil
}

func (c *creator) setCompression(o *qcow2.CreateOptions) error {
	switch value := c.options["compression_type"]; value {
	case "", "zlib":
		o.CompressionType = qcow2.CompressionZlib
	case "zstd":
		o.CompressionType = qcow2.CompressionZstd
	default:
		return notAccepted("compression-type", value)
	}
	return nil
}

func (c *creator) setClusterSize(o *qcow2.CreateOptions) error {
	if text, ok := c.options["cluster_size"]; ok {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n < 512 || n > 2<<20 || n&(n-1) != 0 {
			return errorf("Cluster size must be a power of two between 512 and 2048k")
		}
		o.ClusterSize = n
	}
	if !o.ExtendedL2 {
		return nil
	}
	if o.Version < 3 {
		return errorf("Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)")
	}
	if o.ClusterSize < 16384 {
		return errorf("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes")
	}
	return nil
}

func (c *creator) checkBacking(o *qcow2.CreateOptions) error {
	if o.BackingFile != "" && o.Preallocation != qcow2.PreallocOff && !o.ExtendedL2 {
		return errorf("Backing file and preallocation can only be used at the same time if extended_l2 is on")
	}
	if o.BackingFile == "" && o.BackingFormat != "" {
		return errorf("Backing format cannot be used without backing file")
	}
	return nil
}

func (c *creator) checkVersion(o *qcow2.CreateOptions) error {
	const needs = "(use version=v3 or greater)"
	if o.Version < 3 && o.LazyRefcounts {
		return errorf("Lazy refcounts only supported with compatibility level 1.1 and above %s", needs)
	}
	if text, ok := c.options["refcount_bits"]; ok {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > 64 || n&(n-1) != 0 {
			return errorf("Refcount width must be a power of two and may not exceed 64 bits")
		}
		o.RefcountBits = n
	}
	if o.Version < 3 && o.RefcountBits != 16 {
		return errorf("Different refcount widths than 16 bits require compatibility level 1.1 or above %s", needs)
	}
	return nil
}

func (c *creator) checkCompression(o *qcow2.CreateOptions) error {
	if o.Version < 3 && o.CompressionType != qcow2.CompressionZlib {
		return errorf("Non-zlib compression type is only supported with compatibility level 1.1 and above " +
			"(use version=v3 or greater)")
	}
	return nil
}

// createReason words the failure to create a file.
func createReason(name string, err error) string {
	var lock *storage.LockError
	switch {
	case errors.As(err, &lock):
		return lock.Error()
	case errors.Is(err, storage.ErrFileType) && isDir(name):
		return fmt.Sprintf("Could not create '%s': Is a directory", name)
	case errors.Is(err, os.ErrNotExist), errors.Is(err, os.ErrPermission), errors.Is(err, storage.ErrFileType):
		return strings.Replace(reason(name, err), "Could not open", "Could not create", 1)
	case errors.Is(err, qcow2.ErrTooBig):
		return "The image size is too large for file format 'qcow2' (try using a larger cluster size)"
	}
	return err.Error()
}

func isDir(name string) bool {
	st, err := os.Stat(name)
	return err == nil && st.IsDir()
}
