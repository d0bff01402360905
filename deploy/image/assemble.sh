#!/bin/sh
# Puts the file system of an image together in /runtime, for a last stage that begins from nothing:
#   - the interpreter, the C library and a shell, from the base image;
#   - /opt/venv, compiled: a read-only container could not keep what it compiles, and would compile at every start;
#   - /data and /models, owned by the user that the process runs as, so that a fresh volume there can be written to.
# What only builds or documents stays behind: pip, the package manager's downloads, headers, tests, locales.
set -eu

uid=10001
venv=/opt/venv
runtime=/runtime

if [ -d $venv ]; then
    for site in $venv/lib/python3*/site-packages; do
        rm -rf "$site"/torch/include "$site"/torch/share "$site"/torch/test
        if [ -d "$site"/torch/bin ]; then # torch asks for this program at its import; the rest are its tests
            find "$site"/torch/bin -mindepth 1 -maxdepth 1 ! -name torch_shm_manager -exec rm -rf {} +
        fi
        # Only the packages' own test folders at their top and one below: some packages import what they call testing.
        rm -rf "$site"/*/tests "$site"/*/*/tests
        find "$site" \( -name '*.a' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.h' \) -type f -delete
        echo /opt/pressroom >"$site/pressroom.pth"
    done
    # Some packages carry templates with the ending .py that are not Python: compileall says so and goes on.
    python -m compileall -q -j 0 --invalidation-mode unchecked-hash $venv/lib >/dev/null || true
fi

mkdir -p $runtime/opt $runtime/var/lib/dpkg $runtime/var/tmp $runtime/tmp $runtime/run $runtime/proc $runtime/sys \
    $runtime/dev $runtime/data $runtime/models
for folder in bin etc lib lib64 sbin usr; do
    if [ -e /$folder ]; then cp -a /$folder $runtime/; fi
done
if [ -d $venv ]; then cp -a $venv $runtime$venv; fi
cp -a /var/lib/dpkg/status $runtime/var/lib/dpkg/ # what scanners read

cd $runtime
rm -rf usr/share/doc usr/share/man usr/share/info usr/share/locale usr/share/lintian usr/share/python-wheels usr/src
rm -rf usr/lib/python3/dist-packages usr/local/lib/python3*/site-packages usr/local/bin/pip* usr/bin/pip*
rm -rf usr/lib/apt usr/bin/apt* etc/apt etc/pip.conf
for lib in usr/lib/python3.* usr/local/lib/python3.*; do
    rm -rf "$lib"/ensurepip "$lib"/idlelib "$lib"/lib2to3 "$lib"/test "$lib"/turtledemo "$lib"/config-3*
done

echo "pressroom:x:$uid:$uid::/tmp:/usr/sbin/nologin" >>etc/passwd
echo "pressroom:x:$uid:" >>etc/group
for file in hosts hostname resolv.conf; do : >etc/$file; done # the engine's own, mounted over while this runs
chmod 1777 tmp var/tmp
chown $uid:$uid data models
