package cli

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/droverproject/drover/test/peer"
)

// imgImages makes the images that qemu-img works on and returns them by name.
func imgImages(t *testing.T) map[string]string {
	t.Helper()
	peer.Need(t, "qemu-io", "qemu-img")
	dir := t.TempDir()
	t.Chdir(dir)
	create := func(args ...string) { mustTool(t, "qemu-img", append([]string{"create", "-q", "-f"}, args...)...) }
	write := func(name string, commands ...string) {
		args := []string{"-f", "qcow2"}
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		mustTool(t, "qemu-io", append(args, name)...)
	}
	create("qcow2", "disk", "2M")
	write("disk", "write -P 0xab 0 192k", "write -P 5 640k 64k")
	create("qcow2", "-o", "compat=0.10", "v2", "1M")
	write("v2", "write -P 0xab 0 192k")
	create("qcow2", "-b", "disk", "-F", "qcow2", "over", "2M")
	write("over", "write -P 0xee 64k 64k", "write -z 640k 64k")
	create("qcow2", "-b", "over", "-F", "qcow2", "top", "2M")
	write("top", "write -P 0x44 1M 64k")
	create("qcow2", "snap", "1M")
	mustTool(t, "qemu-img", "snapshot", "-c", "one", "snap")
	write("snap", "write 0 64k")
	mustTool(t, "qemu-img", "bitmap", "--add", "--disable", "snap", "b0")
	mustTool(t, "qemu-img", "bitmap", "--add", "-g", "128k", "snap", "b1")
	write("snap", "write 256k 64k")
	create("qcow2", "-o", "extended_l2=on", "ext", "1M")
	mustTool(t, "qemu-img", "convert", "-c", "-O", "qcow2", "disk", "packed")
	put(t, "raw", strings.Repeat("raw disk", 1000))
	if err := os.Truncate("raw", 1000001); err != nil {
		t.Fatal(err)
	}
	mustTool(t, "qemu-img", "convert", "-O", "raw", "disk", "disk.raw")
	put(t, "key", "secret")
	edit(t, "disk", "leaky", 0x20000+40, 0, 1)
	edit(t, "disk", "broken", 0x20000+10, 0, 0)
	return files(t, dir)
}

// every returns the lines that are tried: all, or in a short run every fourth.
func every(lines []string) []string {
	if !testing.Short() {
		return lines
	}
	var some []string
	for i := 0; i < len(lines); i += 4 {
		some = append(some, lines[i])
	}
	return some
}

// imgSame runs both programs on equal files and compares all that is left.
func imgSame(t *testing.T, all map[string]string, line string) {
	t.Helper()
	args := strings.Fields(line)
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "''", "")
	}
	root := t.TempDir()
	run := func(name string, fn func() outcome) (outcome, string) {
		dir := filepath.Join(root, name)
		fill(t, dir, all)
		t.Chdir(dir)
		return imgMasked(fn()), dir
	}
	want, theirs := run("stock", func() outcome { return stock(t, "", "qemu-img", args...) })
	got, ours := run("drover", func() outcome { return as(t, "", "qemu-img", args...) })
	// Both tell how they are used, each in its own words.
	if strings.Contains(want.stdout, "\nusage: ") && strings.Contains(got.stdout, "\nusage: ") {
		want.stdout, got.stdout = "", ""
	}
	if slices.Contains(args, "json") && want.code == 0 {
		if diff := cmp.Diff(parseJSON(t, want.stdout), parseJSON(t, got.stdout)); diff != "" {
			t.Errorf("%q: JSON differs (-stock +drover):\n%s", args, diff)
		}
		want.stdout, got.stdout = "", ""
	}
	compare(t, args, got, want)
	t.Chdir(ours)
	after, before := files(t, ours), files(t, theirs)
	for name := range before {
		if _, ok := after[name]; !ok && want.code == 0 {
			t.Errorf("%q: %s is missing", args, name)
		}
	}
	for name, content := range after {
		if want.code != 0 && content != all[name] && before[name] == all[name] {
			t.Errorf("%q: refused, and %s has changed", args, name)
		}
		if content == all[name] && before[name] == all[name] || slices.Contains([]string{"broken", "leaky"}, name) && want.code != 0 {
			continue
		}
		if _, ok := before[name]; !ok {
			t.Errorf("%q: only drover leaves %s", args, name)
			continue
		}
		imgSameImage(t, line, name, filepath.Join(theirs, name), ours, content)
	}
}

// imgSameImage compares what the programs have left of an image.
func imgSameImage(t *testing.T, line, name, theirs, ours, content string) {
	t.Helper()
	format := "raw"
	if strings.HasPrefix(content, "QFI\xfb") {
		format = "qcow2"
		checkBoth(t, line, name)
		b := tool(t, "qemu-img", "info", name)
		here := t.TempDir()
		fill(t, here, files(t, filepath.Dir(theirs)))
		t.Chdir(here)
		a := tool(t, "qemu-img", "info", name)
		t.Chdir(ours)
		if diff := cmp.Diff(imgMasked(a), imgMasked(b), cmp.AllowUnexported(outcome{})); diff != "" {
			t.Errorf("%s: what %s says of itself (-stock +drover):\n%s", line, name, diff)
		}
	}
	if strings.Contains(line, "nosuch") {
		return // it cannot be opened
	}
	if o := tool(t, "qemu-img", "compare", "-f", format, "-F", format, name, theirs); o.code != 0 {
		t.Errorf("%s: %s: %s%s", line, name, o.stdout, o.stderr)
	}
}

var imgDates = regexp.MustCompile(`\d\d\d\d-\d\d-\d\d \d\d:\d\d:\d\d`)

// imgMasked masks what differs from run to run and from file system to file system.
func imgMasked(o outcome) outcome {
	o.stdout = diskSize.ReplaceAllString(o.stdout, "")
	o.stdout = regexp.MustCompile(`(?m)^ *"(actual-size|date-n?sec)": \d+,?\n`).ReplaceAllString(o.stdout, "")
	// How many steps a command has is its own affair.
	o.stdout = regexp.MustCompile(`(    \(\d+\.\d\d/100%\)\r)+`).ReplaceAllString(o.stdout, "PROGRESS")
	o.stdout = imgDates.ReplaceAllString(o.stdout, "DATE")
	return o
}

// TestImgCommandLineLikeQEMU: what stands before and around the commands.
func TestImgCommandLineLikeQEMU(t *testing.T) {
	all := imgImages(t)
	lines := []string{
		"", "nosuch", "nosuch -h", "-h", "--help", "-X", "--nosuch", "-T", "-T none*", "-T none* info disk", "--trace=none* info disk",
		"--trace", "-h info", "info -h", "info --help x", "info -X -h", "-- info", "--", "-- info disk", "-q info", "-hX", "--help=3",
		"info -X disk", "info -UX disk", "info --nosuch disk", "info --o disk", "info --output", "info -f", "info -Uf", "info --object",
		"info --b disk", "info --ba disk", "info -U --force-share=x disk", "info disk -U", "info disk --output json", "info disk --out=json",
		"info -- disk", "info -- -f", "info disk -- -f", "info -fqcow2 disk", "info -Ufqcow2 disk", "info --format=qcow2 disk", "info --fo raw disk",
		"measure -a", "measure --nosuch", "measure -f", "measure --size", "measure -h", "dd -h", "resize -h", "resize", "resize a", "resize a b -h",
		"resize -X disk 3M", "resize -f disk 3M", "resize --prealloc disk 3M", "resize -q disk 3M -q", "resize -q -- disk 3M", "resize --nosuch disk 3M",
		"bitmap --me", "convert --s disk x", "snapshot --help", "create --obj",
	}
	for _, c := range imgCommands() {
		if strings.Contains(as(t, "", "qemu-img", c.name).stderr, "Command not found") {
			continue
		}
		lines = append(lines, c.name, c.name+" -X", c.name+" --nosuch", c.name+" nosuch", c.name+" a b c d", c.name+" --image-opts", c.name+" -- -X")
	}
	for _, line := range every(lines) {
		imgSame(t, all, line)
	}
}

func TestImgVersion(t *testing.T) {
	o := as(t, "", "qemu-img", "--version")
	if o.code != 0 || !regexp.MustCompile(`^qemu-img version 7\.2\.22 \(drover .*\)\nCopyright .*\n$`).MatchString(o.stdout) {
		t.Errorf("%+v", o)
	}
	if o := as(t, "", "qemu-img.exe", "-V"); o.code != 0 || !strings.HasPrefix(o.stdout, "qemu-img version 7.2.22 ") {
		t.Errorf("%+v", o)
	}
	if o := as(t, "", "drover", "-V"); o.code != 0 || !strings.HasPrefix(o.stdout, "drover version ") {
		t.Errorf("%+v", o)
	}
}

// TestImgOwnFlags: what drover alone has is not there under the other name.
func TestImgOwnFlags(t *testing.T) {
	all := imgImages(t)
	for _, line := range []string{
		"serve disk", "version", "help", "tcmu", "info --allow-any-path disk", "compare --output=json disk disk", "snapshot -r one two snap",
		"snapshot --output=json snap", "check --force disk", "completion bash", "__complete info", "info --version",
	} {
		imgSame(t, all, line)
	}
}

func TestImgFlagsLikeQEMU(t *testing.T) {
	all := imgImages(t)
	for _, line := range every([]string{
		// amend
		"amend -o compat=0.10 disk", "amend -o compat=1.1 v2", "amend -p -o compat=0.10 disk", "amend -q -p -o compat=0.10 disk",
		"amend -f qcow2 -o lazy_refcounts=on disk", "amend -f raw -o size=1M raw", "amend -f bad -o size=1M disk", "amend -t none -o refcount_bits=8 disk",
		"amend -t bad -o size=1M disk", "amend --force -o size=3M disk", "amend --image-opts -o size=3M driver=qcow2,file.filename=disk",
		"amend -o size=1M disk", "amend -o cluster_size=4k disk", "amend -o nosuch=1 disk", "amend disk", "amend -o help disk", "amend -o help", "amend -f raw -o help",
		"amend -f qcow2 -o help", "amend -f qcow2 -o ?", "amend -o size=3M -o lazy_refcounts=on disk", "amend -o size=3M nosuch", "amend -o size=x disk",
		"amend -o backing_file=x disk", "amend -o '' disk", "amend --object secret,id=a,data=b -o size=3M disk", "amend --object bad,id=a -o size=3M disk",
		"amend -o refcount_bits=64 -p snap", "amend -o size=3M snap", "amend -o data_file=x disk",
		// bitmap
		"bitmap --add disk b", "bitmap --add -g 64k disk b", "bitmap --add --granularity 1M disk b", "bitmap --add -g 3 disk b", "bitmap --add -g x disk b",
		"bitmap --remove snap b0", "bitmap --clear snap b1", "bitmap --enable snap b0", "bitmap --disable snap b1", "bitmap --merge b1 snap b0",
		"bitmap --add --merge b1 --disable snap b2", "bitmap --merge b1 -b snap -F qcow2 --add disk b", "bitmap --merge b1 --source-file snap --source-format qcow2 --add disk b",
		"bitmap --add --image-opts driver=qcow2,file.filename=disk b", "bitmap --add -f qcow2 disk b", "bitmap --remove snap nosuch",
		"bitmap disk b", "bitmap --add", "bitmap --add disk", "bitmap --add snap b1", "bitmap -g 64k --remove snap b1", "bitmap -b snap --add disk b", "bitmap -F qcow2 --add disk b",
		"bitmap --merge nosuch snap b1", "bitmap --add nosuch b", "bitmap --add -f bad disk b", "bitmap --add --object secret,id=a,data=x disk b",
		"bitmap --add --remove disk b", "bitmap --add --clear --enable --disable disk b",
		// check
		"check disk", "check -q disk", "check -f qcow2 disk", "check -f raw disk", "check -f bad disk", "check --format qcow2 disk", "check --output json disk", "check --output=human disk",
		"check --output=xml disk", "check -U disk", "check --force-share disk", "check -T none disk", "check -T bad disk", "check -r leaks leaky", "check -r all leaky", "check --repair=all leaky",
		"check -r bad disk", "check -r", "check leaky", "check -q leaky", "check --output=json leaky", "check -r leaks --output=json leaky", "check raw",
		"check over", "check --image-opts driver=qcow2,file.filename=disk", "check --image-opts -f qcow2 disk", "check nosuch", "check snap", "check packed", "check --object secret,id=a,data=x disk",
		"check -q -r all leaky", "check -U -r all leaky", "check v2", "check ext",
		// compare
		"compare disk disk.raw", "compare -f qcow2 -F raw disk disk.raw", "compare -f raw -F raw disk disk", "compare -p disk disk.raw", "compare -q disk over", "compare disk over", "compare -s disk packed",
		"compare -s disk disk", "compare -s disk v2", "compare disk v2", "compare -U disk disk", "compare --force-share disk disk", "compare -T none disk disk", "compare -T bad disk disk", "compare disk", "compare a b c",
		"compare nosuch disk", "compare disk nosuch", "compare -f bad disk disk", "compare -F bad disk disk", "compare --image-opts driver=qcow2,file.filename=disk driver=raw,file.filename=disk.raw",
		"compare --image-opts -f qcow2 disk disk", "compare -q -p disk disk", "compare --object secret,id=a,data=x disk disk", "compare -s -q disk packed",
		// create
		"create new 1M", "create -f qcow2 new 1M", "create -q -f qcow2 new 1M", "create -f qcow2 -b disk -F qcow2 new", "create -f qcow2 -b disk new", "create -u -f qcow2 -b nosuch -F qcow2 new 1M",
		"create -f qcow2 -u -b nosuch new 1M", "create -f qcow2 -o cluster_size=4k new 1M", "create -f qcow2 -o help", "create -f qcow2 -o ?", "create -f qcow2 -o help new", "create -o help new 1M", "create -o help", "create -f raw -o help", "create -f bad new 1M", "create --object secret,id=a,data=x new 1M",
		"create -f qcow2 new", "create -f qcow2 new 1M 2M", "create -f qcow2 new x", "create -F qcow2 -f qcow2 new 1M", "create -f qcow2 -o backing_file=disk -F qcow2 new", "create -f qcow2 -o compat=0.10,lazy_refcounts=on new 1M",
		"create -f raw -o preallocation=full new 64k", "create -f raw -o size=1M new", "create new", "create -f qcow2 -q -q new 1k", "create -f qcow2 disk 1M", "create -b disk new 1M", "create -f qcow2 new -- 1M", "create -f qcow2 new 1M -q",
		"create -f qcow2 -o encrypt.format=aes new 1M", "create -f qcow2 -o encryption=on new 1M",
		// dd
		"dd if=disk of=new", "dd -f qcow2 -O qcow2 if=disk of=new", "dd -O raw if=disk of=new", "dd bs=64k count=2 if=disk of=new", "dd skip=1 bs=64k count=2 if=disk of=new", "dd -U if=disk of=new", "dd --force-share if=disk of=new",
		"dd if=nosuch of=new", "dd -f bad if=disk of=new", "dd -O bad if=disk of=new", "dd bs=x if=disk of=new", "dd bs=0 if=disk of=new", "dd count=x if=disk of=new", "dd skip=x if=disk of=new", "dd if=disk", "dd nosuch=1 if=disk of=new",
		"dd --image-opts if=driver=qcow2,file.filename=disk of=new", "dd if=raw of=new", "dd -f raw if=disk of=new", "dd skip=100M if=disk of=new", "dd --object secret,id=a,data=x if=disk of=new", "dd bs=1M skip=2 if=disk of=new", "dd count=0 if=disk of=new", "dd a b",
		"dd -O qcow2 bs=3M if=disk of=new", "dd bs=1000 count=3 if=raw of=new",
		// info
		"info disk", "info -f qcow2 disk", "info -f raw disk", "info --format raw disk", "info --output=json disk", "info --output=human disk", "info --output=xml disk", "info --backing-chain top", "info --backing-chain --output=json top",
		"info -U disk", "info --force-share disk", "info --image-opts driver=qcow2,file.filename=disk", "info --image-opts -f raw disk", "info nosuch", "info -f bad disk", "info snap", "info --output=json snap", "info over", "info raw", "info --object secret,id=a,data=x disk",
		"info --object secret,id=a disk", "info --object secret disk", "info --object nosuch,id=a disk", "info --object secret,id=1,data=x disk", "info v2", "info packed", "info ext",
		// map
		"map disk", "map over", "map top", "map --output=json top", "map --output=human disk", "map --output=xml disk", "map -f raw disk", "map -f bad disk", "map -s 64k disk", "map -l 64k disk", "map --start-offset=64k --max-length 100k --output=json disk",
		"map -s x disk", "map -l x disk", "map -U disk", "map --force-share disk", "map --image-opts driver=qcow2,file.filename=disk", "map nosuch", "map packed", "map --output=json packed", "map disk.raw", "map --output=json raw", "map --object secret,id=a,data=x disk",
		"map -s 1G disk", "map -s 1G --output=json disk", "map --image-opts -f raw disk",
		// measure
		"measure disk", "measure -f qcow2 disk", "measure -O qcow2 disk", "measure -O raw disk", "measure -O qcow2 --output=json disk", "measure --output=human disk", "measure --output=xml disk", "measure --size 1G", "measure --size 1G -O qcow2", "measure --size x",
		"measure -O qcow2 -o cluster_size=4k disk", "measure -O qcow2 -o nosuch=1 disk", "measure -O bad disk", "measure -f bad disk", "measure -U disk", "measure --force-share -O qcow2 disk", "measure --image-opts -O qcow2 driver=qcow2,file.filename=disk", "measure nosuch",
		"measure -O qcow2 -l one snap", "measure -O qcow2 -l snapshot.name=one snap", "measure -O qcow2 -l nosuch snap", "measure -O qcow2 snap", "measure --size 1M disk", "measure disk disk", "measure -O qcow2 over", "measure -O qcow2 raw", "measure --size 1G -f raw", "measure --size 1G -l one",
		"measure -O qcow2 --size 1G --output json", "measure -O qcow2 -o help", "measure -O qcow2 -o size=1G disk", "measure --object secret,id=a,data=x -O qcow2 disk",
		// rebase
		"rebase -u -b disk -F qcow2 top", "rebase -u -b '' over", "rebase -u -b nosuch -F raw over", "rebase -u -b nosuch over", "rebase -b disk -F qcow2 top", "rebase -b disk top", "rebase -p -b disk -F qcow2 top", "rebase -b '' over", "rebase -q -b '' over", "rebase -f qcow2 -b '' over",
		"rebase -f raw -b '' raw", "rebase -t none -T none -b '' over", "rebase -t bad -b '' over", "rebase -T bad -b '' over", "rebase -U -b '' over", "rebase over", "rebase -u over", "rebase -b nosuch -F qcow2 over", "rebase -F bad -b disk over", "rebase --image-opts -u -b '' driver=qcow2,file.filename=over",
		"rebase -u -b disk -F bad top", "rebase nosuch -b x", "rebase --object secret,id=a,data=x -u -b disk -F qcow2 top",
		// resize
		"resize disk 3M", "resize disk +1M", "resize -q disk +1M", "resize disk -64k", "resize --shrink disk -64k", "resize --shrink disk 1M", "resize -f qcow2 disk 3M", "resize -f raw raw 2M", "resize raw 2M", "resize --preallocation=metadata disk 3M", "resize --preallocation=full disk 3M",
		"resize --preallocation=falloc disk 3M", "resize --preallocation=off disk 3M", "resize --preallocation=bad disk 3M", "resize --image-opts driver=qcow2,file.filename=disk 3M", "resize disk x", "resize disk +x", "resize nosuch 1M", "resize -f bad disk 3M", "resize disk 2M", "resize --object secret,id=a,data=x disk 3M",
		"resize -f raw --shrink disk.raw 1M", "resize -f raw --preallocation=full disk.raw 3M", "resize --image-opts -f raw disk 3M", "resize snap 2M", "resize v2 3M", "resize disk ''",
		// snapshot
		"snapshot -l snap", "snapshot snap -l", "snapshot -c new disk", "snapshot -c two snap", "snapshot -a one snap", "snapshot -d one snap", "snapshot -q -d one snap", "snapshot -d nosuch snap", "snapshot -a nosuch snap", "snapshot -l -c x snap", "snapshot -c x -d y snap", "snapshot -U -l snap", "snapshot --force-share -l snap",
		"snapshot -U -c x snap", "snapshot --image-opts -l driver=qcow2,file.filename=snap", "snapshot -l nosuch", "snapshot -l raw", "snapshot -l disk", "snapshot -c x -c y disk", "snapshot --object secret,id=a,data=x -l snap", "snapshot -l a b", "snapshot -d 1 snap", "snapshot -a 1 snap",
	}) {
		imgSame(t, all, line)
	}
}

func TestImgConvertFlagsLikeQEMU(t *testing.T) {
	all := imgImages(t)
	for _, line := range every([]string{
		"convert disk new", "convert -O qcow2 disk new", "convert -f qcow2 -O raw disk new", "convert -c -O qcow2 disk new", "convert -c -O raw disk new", "convert -C -O raw disk.raw new", "convert -C -c -O qcow2 disk new", "convert -p -O qcow2 disk new", "convert -q -p -O qcow2 disk new",
		"convert -n -O qcow2 disk v2", "convert -n -O raw disk disk.raw", "convert -n -O raw disk nosuch", "convert -n -o size=1M -O raw disk disk.raw", "convert -f raw disk.raw new", "convert -f bad disk new", "convert -O bad disk new", "convert -t none -T none -O qcow2 disk new", "convert -t bad disk new",
		"convert -T bad disk new", "convert -B disk -F qcow2 -O qcow2 over new", "convert -B disk -O qcow2 over new", "convert -F qcow2 -O qcow2 over new", "convert -o backing_file=disk,backing_fmt=qcow2 -O qcow2 over new", "convert -o backing_file=disk -O qcow2 over new", "convert -o cluster_size=4k -O qcow2 disk new",
		"convert -o nosuch=1 -O qcow2 disk new", "convert -o help -O qcow2 disk new", "convert -O qcow2 -o help", "convert -O raw -o help disk new", "convert -o help", "convert -O qcow2 -o help disk", "convert -l one -O qcow2 snap new", "convert -l snapshot.name=one -O qcow2 snap new", "convert -l snapshot.id=1 -O raw snap new", "convert -l nosuch snap new", "convert -l snapshot.bad=1 snap new",
		"convert -S 0 -O raw disk new", "convert -S 64k -O qcow2 disk new", "convert -S x disk new", "convert -S 100 disk new", "convert -S 1G disk new", "convert -r 100M -O qcow2 disk new", "convert -r x disk new", "convert -m 4 -O qcow2 disk new", "convert -m 0 disk new", "convert -m 17 disk new", "convert -m x disk new",
		"convert -W -O qcow2 disk new", "convert -U -O qcow2 disk new", "convert --force-share -O qcow2 disk new", "convert --salvage -O qcow2 disk new", "convert --salvage -C disk new", "convert --image-opts -O qcow2 driver=qcow2,file.filename=disk new", "convert --image-opts -f qcow2 disk new",
		"convert --target-is-zero -O qcow2 disk new", "convert --target-is-zero -n -O qcow2 disk ext", "convert disk", "convert", "convert nosuch new", "convert disk raw new", "convert -O qcow2 disk raw new", "convert -B disk -F qcow2 -O qcow2 disk raw new",
		"convert --skip-broken-bitmaps -O qcow2 snap new", "convert --bitmaps -O raw snap new", "convert -S 4k -C disk new", "convert --target-image-opts disk new", "convert -O qcow2 disk /nosuch/new", "convert --object secret,id=a,data=x -O qcow2 disk new", "convert -O qcow2 over new", "convert -O qcow2 packed new",
		"convert -c -o preallocation=metadata -O qcow2 disk new", "convert -o preallocation=full -O qcow2 disk new", "convert -o compat=0.10 -O qcow2 disk new", "convert -o size=4M -O qcow2 disk new", "convert -O qcow2 disk disk", "convert -o backing_file=x -B disk -F qcow2 -O qcow2 over new",
	}) {
		imgSame(t, all, line)
	}
}
